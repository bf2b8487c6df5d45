"""Fields that were filled in when an adapter was made, against the fields that a user gives: they must still agree.

Checked when a config is made or read, before it makes an adapter, and before it is saved.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from peft_longlora.rope.parameters import PROPORTIONAL, ROUNDING, is_nested, of_full_attention
from peft_longlora.rope.values import ORIGINAL, SCALING, kept_entries

if TYPE_CHECKING:
    from peft_longlora.adapter.config import LongLoraConfig

_CLOSE = 1e-6  # numbers that were computed twice, or went through a file


def check_filled_in(config: LongLoraConfig) -> None:
    """Refuse a config that was filled in for one RoPE or group size and then edited, because it holds the old one.

    Raises: ValueError.
    """
    if config.applied_rope_parameters is not None:
        _check_rope(config)
    _check_group(config)


def _check_group(config: LongLoraConfig) -> None:
    applied, window = config.applied_group_size, config.base_context_length
    if applied is None or window is None or config.attention_pattern == "full":  # which has no groups
        return
    is_share = config.group_size is None
    if is_share and config.context_length is None and config.base_rope_parameters is None:
        return  # older files may hold another length than the window
    if (size := config.group_size_on(window)) != applied:
        share = f"group_size_ratio={config.group_size_ratio!r} of {config.context_length or window} tokens"
        raise ValueError(
            f"{share if is_share else f'group_size={size}'} gives groups of {size} tokens, which do not fit "
            f"applied_group_size={applied}, which was filled in when this config made an adapter. Make a new "
            f"LongLoraConfig, or set applied_group_size=None."
        )


def _check_rope(config: LongLoraConfig) -> None:
    applied, base, window = config.applied_rope_parameters, config.base_context_length, config.context_length
    asked, difference = f"context_length={window} and rope_type={config.rope_type!r}", None
    if config.rope_parameters is not None:
        asked = f"rope_parameters={config.rope_parameters!r}"
        difference = _other_than_given(config.rope_parameters, applied, config.base_rope_parameters or {})
    elif window is None:
        asked = "context_length=None and rope_parameters=None"
        difference = "RoPE is not changed then" if base is not None else None
    elif base is None:
        return
    else:
        difference = _other_than_named(config.rope_type, window, base, applied, config.base_rope_parameters or {})
    in_use = config.applied_context_length or window
    has_same_window = window is None or abs(in_use - window) <= (window * ROUNDING if config.rope_parameters else 0)
    if difference or not has_same_window:
        filled_in = f"applied_context_length={in_use}"
        if difference:
            filled_in = f"applied_rope_parameters={applied} ({difference})"
        elif config.rope_parameters is not None:
            asked = f"context_length={window}"
        raise ValueError(
            f"{asked} do not fit {filled_in}, which was filled in when this config made an adapter. Make a new "
            f"LongLoraConfig, or set applied_rope_parameters=None."
        )


def _other_than_named(
    rope_type: str, window: int, base: int, applied: dict[str, Any], of_base: dict[str, Any]
) -> str | None:
    """The first entry in use that a rope_type does not give for this window on this base, in words.

    Args:
        window, base: tokens, of the adapter and of its base.
        applied: the parameters in use. of_base: the base's own, empty if they are not known.
    """
    kind = {"ntk": "default", "learned": "yarn"}.get(rope_type, rope_type)
    of_base = of_full_attention(of_base)
    is_proportional = of_base.get("rope_type") == PROPORTIONAL
    kind = PROPORTIONAL if is_proportional else kind
    wanted: dict[str, Any] = {"rope_type": kind, "type": kind}
    if rope_type != "ntk":
        # The factor was rounded to whole tokens in older files.
        near = abs(applied.get("factor", 0.0) * base - window) <= 1
        wanted["factor"] = applied.get("factor") if near else window / base
    if kind in ("yarn", "llama3"):
        wanted[ORIGINAL] = base
    if kind == "llama3":
        wanted |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type == "ntk" and {"rope_theta"} <= applied.keys() & of_base.keys():
        ratio = applied["rope_theta"] / of_base["rope_theta"]
        share = of_base.get("partial_rotary_factor", 1.0) if is_proportional else 1.0
        if not _is_raised(ratio, window / base, share):
            return f"rope_theta={applied['rope_theta']!r} is not the base's {of_base['rope_theta']!r}, raised as 'ntk'"
        of_base = {name: value for name, value in of_base.items() if name != "rope_theta"}
    return _other_entry(applied, wanted, of_base)


def _is_raised(ratio: float, factor: float, share: float) -> bool:
    """Whether theta's ratio is factor ** (d / (r - 2)) for an even d, the numbers of a head, and r, the share of them
    that rotates."""
    if factor <= 1 or ratio <= 0:
        return False
    rotating = ((d, 2 * int(share * d // 2)) for d in range(4, 1026, 2))
    power = math.log(ratio) / math.log(factor)
    return any(r > 2 and math.isclose(power, d / (r - 2), rel_tol=_CLOSE) for d, r in rotating)


def _other_than_given(given: dict[str, Any], applied: dict[str, Any], of_base: dict[str, Any]) -> str | None:
    """The first entry in use that is neither the user's nor the base's own, in words.

    transformers adds and renames entries, so what only one of them has may stay, unless it scales.
    """
    if is_nested(given):
        for kind, parameters in given.items():
            if parameters is None:
                continue
            if not isinstance(applied.get(kind), dict):
                return f"it has none for {kind}"
            own = of_base.get(kind) if is_nested(of_base) else of_base
            if difference := _other_than_given(parameters, applied[kind], own or {}):
                return f"{kind}: {difference}"
        return None
    wanted = {"type": given.get("rope_type"), ORIGINAL: applied.get(ORIGINAL), **given}
    return _other_entry(applied, wanted, of_full_attention(of_base))


def _other_entry(applied: dict[str, Any], wanted: dict[str, Any], of_base: dict[str, Any]) -> str | None:
    """The first entry in use that is not as wanted; one that scales nothing may also be the base's own."""
    for name, value in applied.items():
        if name in wanted:
            right = wanted[name]
        elif name in SCALING and name not in kept_entries(of_base):
            right = None
        elif name in of_base:
            right = of_base[name]
        else:
            continue
        if not _is_same(value, right):
            return f"{name}={value!r} there, " + ("and they give none" if right is None else f"and they give {right!r}")
    return None


def _is_same(value: Any, right: Any) -> bool:
    if isinstance(value, list | tuple) and isinstance(right, list | tuple):
        return len(value) == len(right) and all(map(_is_same, value, right))
    if type(value) in (int, float) and type(right) in (int, float):
        return math.isclose(value, right, rel_tol=_CLOSE)
    return value == right

"""Which values RoPE parameters may have. They may come from a file that is damaged or hostile."""

from __future__ import annotations

import math
from typing import Any

ORIGINAL = "original_max_position_embeddings"
MOST_TOKENS = 2**40  # far beyond any window
# Entries that say how RoPE is scaled. The others (theta, sections for images and videos, the share of a head that
# rotates, ...) belong to the architecture, so a new scaling keeps them.
SCALING = {
    *(
        "rope_type",
        "type",
        "factor",
        ORIGINAL,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ),
    *("truncate", "short_factor", "long_factor", "short_mscale", "long_mscale", "low_freq_factor", "high_freq_factor"),
}
# What a value must be, its smallest and its largest; the largest is far beyond what models use.
_SCALES = ("must be a number above 0, at most 100", 1e-6, 100.0)
_TURNS = ("must be a number above 0, at most 10,000", 1e-6, 1e4)
_RULES = {
    "factor": ("must be a number, 1 or more and at most a million: the new window divided by the base's", 1.0, 1e6),
    "rope_theta": ("must be a number above 0, at most 1e15", 1e-6, 1e15),
    ORIGINAL: ("must be a number of tokens, 1 or more", 1, MOST_TOKENS),
    "partial_rotary_factor": ("must be a share of a head, above 0 and at most 1", 1e-6, 1.0),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim", "short_mscale", "long_mscale"), _SCALES),
    **dict.fromkeys(("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"), _TURNS),
    **dict.fromkeys(("short_factor", "long_factor"), ("must be a list of numbers above 0", 1e-6, 1e6)),
}
_LISTS = {"short_factor", "long_factor"}
_OPTIONAL = _RULES.keys() - _LISTS - {"factor", "rope_theta", ORIGINAL, "partial_rotary_factor"}  # may be None


def kept_entries(parameters: dict[str, Any]) -> dict[str, Any]:
    """The entries of one kind of layer that say how nothing is scaled, which a new scaling keeps.

    The original length is one of them where RoPE does not scale from it: queries may (ministral3).
    """
    is_own = "llama_4_scaling_beta" in parameters or parameters.get("rope_type") in (
        None,
        "default",
        "linear",
        "dynamic",
    )
    lost = SCALING - {ORIGINAL} if is_own else SCALING
    return {name: value for name, value in parameters.items() if name not in lost}


def check_values(parameters: dict[str, Any]) -> None:
    """Refuse values that RoPE cannot be computed with.

    Args:
        parameters: rope_parameters of one kind of layer.

    Raises: ValueError.
    """
    for name, value in parameters.items():
        if (rule := _broken_rule(name, value)) is not None:
            raise ValueError(
                f"rope_parameters={parameters!r}: {name}={value!r} {rule}. If this is an adapter's config, the file is "
                f"damaged: get it again."
            )
    low, high = parameters.get("low_freq_factor"), parameters.get("high_freq_factor")
    if None not in (low, high) and low >= high:
        raise ValueError(
            f"rope_parameters={parameters!r}: low_freq_factor={low!r} must be below high_freq_factor={high!r}."
        )


def _broken_rule(name: str, value: Any) -> str | None:
    if name == "rope_type":
        return None if isinstance(value, str) else "must be a name that transformers knows, such as 'yarn'"
    if name not in _RULES:  # an architecture's own entry
        is_finite = not isinstance(value, float) or math.isfinite(value)
        return None if is_finite else "must be a finite number"
    rule, low, high = _RULES[name]
    if name in _LISTS:
        is_right = isinstance(value, list | tuple) and all(_is_between(each, low, high) for each in value)
    else:
        is_right = _is_between(value, low, high) or (value is None and name in _OPTIONAL)
    return None if is_right else rule


def _is_between(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high

"""RoPE parameters: which of them are valid, and which window they give. Reads configs; never touches a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from peft_longlora.architecture import is_local_type
from peft_longlora.rope.values import ORIGINAL, check_values

ROPE_TYPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "longrope", "learned")
PROPORTIONAL = "proportional"  # a base's own form, in which only a part of each head rotates; it may have a factor
ROUNDING = 0.01  # people write factors with two or three digits, which is about this inexact


def base_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope_parameters of the layers with full attention (a config may hold one dict for each layer type).

    Returns: an empty dict if these layers have no RoPE.

    Raises: NotImplementedError: there are dicts, and it is unclear which of them is for full attention.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if is_nested(parameters):
        check_form(config)
    return of_full_attention(parameters)


def full_type(parameters: dict[str, Any]) -> str | None:
    """The layer type with full attention in nested rope_parameters: the only one that names no window or chunks.

    Returns: None if there are several, or none.
    """
    types = [name for name, value in parameters.items() if value is None or isinstance(value, dict)]
    full = [name for name in types if not is_local_type(name)]
    return "full_attention" if "full_attention" in full else full[0] if len(full) == 1 else None


def of_full_attention(parameters: dict[str, Any]) -> dict[str, Any]:
    """The part of rope_parameters, nested or not, that is for full attention; empty if there is none."""
    return (parameters.get(full_type(parameters)) or {}) if is_nested(parameters) else parameters


def check_form(config: PreTrainedConfig) -> None:
    """Refuse a config whose RoPE cannot be rescaled because it is not stated as transformers states it.

    Raises: NotImplementedError.
    """
    parameters = getattr(config, "rope_parameters", None)
    is_dict = isinstance(parameters, dict) and bool(parameters)
    is_dict = is_dict and (not is_nested(parameters) or full_type(parameters) is not None)
    if not is_dict or not isinstance(getattr(config, "max_position_embeddings", None), int):
        kinds = f" for {sorted(parameters)}" if isinstance(parameters, dict) else ""
        raise NotImplementedError(
            f"{config.model_type} states its RoPE in a form of its own (rope_parameters{kinds or f'={parameters!r}'}), "
            f"not for all layers or for one type without a window, so it is unclear what to rescale. Use an "
            f"architecture with plain rope_parameters (llama, qwen3, mistral, gemma3, gpt_neox, ...)."
        )


def window_of(config: PreTrainedConfig) -> int:
    """The context window in tokens that a config gives, its RoPE scaling included.

    Source: the rule by which serving engines compute a model's length. If `keeps_length`, it is the stored length times
    the factor; otherwise it is the stored length.
    """
    rope = base_rope(config)
    factor = rope.get("factor", 1.0) if keeps_length(config, rope.get("rope_type", "default")) else 1.0
    return round(config.max_position_embeddings * factor)


def keeps_length(config: PreTrainedConfig, rope_type: str) -> bool:
    """Whether configs with this scaling keep the pretrained length in max_position_embeddings.

    "dynamic" needs this length to compute, and "linear" keeps it by convention. But if each layer type has its own
    scaling, as in Gemma 3, no single factor belongs to the model, so the config stores the window itself.
    """
    return rope_type == "dynamic" or (rope_type == "linear" and not is_nested(config.rope_parameters))


def is_nested(parameters: dict[str, Any]) -> bool:
    """Whether rope_parameters hold one dict for each layer type."""
    return any(isinstance(value, dict) for value in parameters.values())


def follows_longest(config: PreTrainedConfig) -> bool:
    """Whether frequencies depend on the longest position of a forward; a config may hold one RoPE for each type of
    layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    return any(one.get("rope_type") in ("dynamic", "longrope") for one in each)


def check_rope(rope_type: str, rope_parameters: dict[str, Any] | None) -> None:
    """Refuse parameters that no model can use.

    Raises: ValueError.
    """
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is unknown. Use one of {', '.join(map(repr, ROPE_TYPES))}.")
    if rope_parameters is not None:
        if not isinstance(rope_parameters, dict):
            raise ValueError(
                f"rope_parameters={rope_parameters!r} must be a dict as in a transformers config, for example "
                f"{{'rope_type': 'linear', 'factor': 4.0}}. To give only a name, use rope_type."
            )
        for parameters in rope_parameters.values() if is_nested(rope_parameters) else (rope_parameters,):
            if not isinstance(parameters, dict | None):
                raise ValueError(
                    f"rope_parameters={rope_parameters!r} mixes {parameters!r} with a dict for each layer type. Give "
                    f"one dict, or a dict of dicts."
                )
            if parameters is not None:
                _check_parameters(rope_type, parameters)
    elif rope_type == "longrope":
        raise ValueError(
            "rope_type='longrope' needs factors that were searched for this model. Give rope_parameters with "
            "rope_type, short_factor, long_factor and original_max_position_embeddings."
        )


def _check_parameters(rope_type: str, parameters: dict[str, Any]) -> None:
    # "yarn" is the default, so the user may not have given it. "longrope" is the only type that needs both.
    if rope_type != "yarn" and not rope_type == parameters.get("rope_type") == "longrope":
        raise ValueError(
            f"rope_type={rope_type!r} and rope_parameters={parameters!r} exclude each other: rope_parameters is used "
            f"as it is. Give one of them."
        )
    check_values(parameters)
    if "rope_type" not in parameters:
        raise ValueError(f"rope_parameters={parameters!r} lacks 'rope_type'. Add it, as transformers wants it.")
    if parameters["rope_type"] in ("linear", "dynamic", "yarn", "llama3") and "factor" not in parameters:
        raise ValueError(
            f"rope_parameters={parameters!r} lacks 'factor', the new window divided by the base's. Add it."
        )


def completed(rope_parameters: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """The same parameters, with original_max_position_embeddings added for "yarn", "llama3" and "longrope".

    These types scale from an original length. Without it transformers takes the length stored in the config; here that
    is the base's.
    """
    if is_nested(rope_parameters):
        before = config.rope_parameters if is_nested(config.rope_parameters) else {}
        pairs = {kind: (given, before.get(kind) or {}) for kind, given in rope_parameters.items()}
        return {kind: given and _with_original(given, old, config) for kind, (given, old) in pairs.items()}
    return _with_original(rope_parameters, base_rope(config), config)


def _with_original(given: dict[str, Any], before: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    if given["rope_type"] not in ("yarn", "llama3", "longrope"):
        return dict(given)
    is_same_kind = before.get("rope_type") == given["rope_type"]  # then the base scales from the same length
    original = before.get(ORIGINAL) if is_same_kind else None
    return {ORIGINAL: original or config.max_position_embeddings, **given}


def stated_length(config: PreTrainedConfig, context_length: int | None, rope_parameters: dict[str, Any]) -> int:
    """max_position_embeddings for rope_parameters that the user gave (after `completed`).

    Raises: ValueError: they give a shorter window than context_length. A longer window is allowed: it leaves room.
    """
    stored, before = config.max_position_embeddings, base_rope(config)
    rope_parameters = of_full_attention(rope_parameters) or before
    kind, factor = rope_parameters["rope_type"], rope_parameters.get("factor", 1.0)
    if kind == "yarn":
        original = rope_parameters[ORIGINAL]
    elif kind in ("linear", "dynamic") or (kind == PROPORTIONAL and "factor" in rope_parameters):
        original = stored if keeps_length(config, kind) else round(stored / before.get("factor", 1.0))
    else:  # their parameters do not give a window
        return context_length or stored
    window = round(factor * original)
    if context_length is not None and context_length > window * (1 + ROUNDING):
        raise ValueError(
            f"context_length={context_length}, but rope_parameters={rope_parameters} extend {original} tokens "
            f"only to a window of {window}. Set factor to {context_length / original} or more, or lower context_length."
        )
    return stored if keeps_length(config, kind) else window

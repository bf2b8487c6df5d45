"""What RoPE parameters say: which of them are valid, and which window they give. Reads configs, touches no model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

ROPE_TYPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "longrope")


def base_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope_parameters of the layers with full attention (configs may hold one dict a layer type)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters["full_attention"] if is_nested(parameters) else parameters


def window_of(config: PreTrainedConfig) -> int:
    """The context window in tokens that a config states, its RoPE scaling included.

    Source: the rule by which serving engines derive a model's length: where `keeps_length`, the stored length times the
    factor, elsewhere the stored length.
    """
    rope = base_rope(config)
    factor = rope.get("factor", 1.0) if keeps_length(config, rope.get("rope_type", "default")) else 1.0
    return round(config.max_position_embeddings * factor)


def keeps_length(config: PreTrainedConfig, rope_type: str) -> bool:
    """Whether configs with this scaling keep the pretrained length in max_position_embeddings.

    "dynamic" computes with it, "linear" does so by custom. But where layer types have a scaling each, as in Gemma 3, no
    factor is that of the model, and the window itself is stored.
    """
    return rope_type == "dynamic" or (rope_type == "linear" and not is_nested(config.rope_parameters))


def is_nested(parameters: dict[str, Any]) -> bool:
    """Whether rope_parameters are one dict a layer type."""
    return any(isinstance(value, dict) for value in parameters.values())


def check_rope(rope_type: str, rope_parameters: dict[str, Any] | None) -> None:
    """Refuse what no model could be given.

    Raises: ValueError.
    """
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is unknown. Use one of {', '.join(map(repr, ROPE_TYPES))}.")
    if rope_parameters is not None:
        if not isinstance(rope_parameters, dict):
            raise ValueError(
                f"rope_parameters={rope_parameters!r} must be a dict as in a transformers config, for example "
                f"{{'rope_type': 'linear', 'factor': 4.0}}. Use rope_type for a name alone."
            )
        for parameters in rope_parameters.values() if is_nested(rope_parameters) else (rope_parameters,):
            if parameters is not None:
                _check_parameters(rope_type, parameters)
    elif rope_type == "longrope":
        raise ValueError(
            "rope_type='longrope' needs factors that a search found for one model. Give rope_parameters with "
            "rope_type, short_factor, long_factor and original_max_position_embeddings."
        )


def _check_parameters(rope_type: str, parameters: dict[str, Any]) -> None:
    if rope_type != "yarn" and parameters.get("rope_type") != rope_type:
        raise ValueError(
            f"rope_type={rope_type!r} and rope_parameters={parameters!r} exclude each other: rope_parameters is used "
            f"as it is. Give one of them."
        )
    factor = parameters.get("factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor >= 1:
        raise ValueError(
            f"rope_parameters={parameters!r}: factor={factor!r} must be a number, 1 or more: the new window over the "
            f"base's."
        )
    if "rope_type" not in parameters:
        raise ValueError(f"rope_parameters={parameters!r} lacks 'rope_type'. Add it, as transformers wants it.")
    if parameters["rope_type"] in ("linear", "dynamic", "yarn", "llama3") and "factor" not in parameters:
        raise ValueError(f"rope_parameters={parameters!r} lacks 'factor': the new window over the base's. Add it.")


def stated_length(config: PreTrainedConfig, context_length: int | None, rope_parameters: dict[str, Any]) -> int:
    """max_position_embeddings for rope_parameters that the user gave.

    Raises: ValueError: they give another window than context_length.
    """
    stored, before = config.max_position_embeddings, base_rope(config)
    if is_nested(rope_parameters):
        rope_parameters = rope_parameters.get("full_attention") or before
    kind, factor = rope_parameters["rope_type"], rope_parameters.get("factor", 1.0)
    if kind == "yarn":
        original = rope_parameters.get("original_max_position_embeddings", stored)
    elif kind in ("linear", "dynamic"):
        original = stored if keeps_length(config, kind) else round(stored / before.get("factor", 1.0))
    else:  # their parameters do not tell
        return context_length or stored
    if context_length is not None and context_length != round(factor * original):
        raise ValueError(
            f"context_length={context_length}, but rope_parameters={rope_parameters} extend {original} tokens to a "
            f"window of {round(factor * original)}. Set factor to {context_length / original}, or leave context_length "
            f"out (context_length={round(factor * original)} says the same)."
        )
    return stored if keeps_length(config, kind) else round(factor * original)

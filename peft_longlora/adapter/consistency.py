"""Fields of a `LongLoraConfig` that do not go together: they exclude each other, or make each other idle.

`rules` checks each field by itself; this file checks them together. A config that was filled in (read from a file) is
not refused for idle fields, because older versions wrote such files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_longlora.attention.effect import check_effect
from peft_longlora.rope.parameters import ROUNDING, is_nested

if TYPE_CHECKING:
    from peft_longlora.adapter.config import LongLoraConfig


def check_together(config: LongLoraConfig) -> None:
    """Refuse fields that exclude each other or make each other idle.

    Raises: ValueError.
    """
    _check_layers_and_weights(config)
    if config.base_context_length is not None:
        return
    check_effect(
        config.attention_pattern,
        group_size=config.group_size,
        group_size_ratio=config.group_size_ratio,
        chosen_blocks=config.chosen_blocks,
        dense_layers=config.dense_layers,
        dense_every=config.dense_every,
        name="attention_pattern",
    )
    # `fit` says more about "learned", which no window below the base's can begin.
    if config.rope_type not in ("yarn", "learned") and config.rope_parameters is None and config.context_length is None:
        raise ValueError(
            f"rope_type={config.rope_type!r} has no effect without context_length: RoPE would not be changed. Give the "
            f"window to extend to, or leave rope_type out."
        )


def _check_layers_and_weights(config: LongLoraConfig) -> None:
    if config.layer_replication and config.dense_layers:
        raise ValueError(
            f"dense_layers={config.dense_layers!r} and layer_replication={config.layer_replication!r} cannot be used "
            f"together: replication changes the numbers of layers. Leave one of them out."
        )
    if config.bias != "none" and config.train_norms:
        raise ValueError(
            f"bias={config.bias!r} and train_norms=True would train the biases of norms twice. Use bias='none', or "
            f"train_norms=False."
        )
    if config.trainable_token_indices is not None and config.train_embeddings:
        raise ValueError(
            "trainable_token_indices trains some rows of the embeddings, but train_embeddings=True trains all. Set "
            "train_embeddings=False, or leave trainable_token_indices out."
        )


def check_filled_in(config: LongLoraConfig) -> None:
    """Refuse a config that was filled in for one RoPE and then edited, because it holds the old one.

    Raises: ValueError.
    """
    applied, base, window = config.applied_rope_parameters, config.base_context_length, config.context_length
    if applied is None:
        return
    asked = f"context_length={window} and rope_type={config.rope_type!r}"
    if config.rope_parameters is not None:
        asked = f"rope_parameters={config.rope_parameters!r}"
        fits = _are_within(config.rope_parameters, applied)
    elif window is None:
        fits, asked = base is None, "context_length=None and rope_parameters=None"
    elif base is None:
        return
    else:
        kind = {"ntk": "default", "learned": "yarn"}.get(config.rope_type, config.rope_type)
        factor = applied.get("factor", window / base)
        fits = applied.get("rope_type") == kind and abs(factor * base - window) <= 1
    in_use = config.applied_context_length or window
    has_same_window = window is None or abs(in_use - window) <= (window * ROUNDING if config.rope_parameters else 0)
    if not fits or not has_same_window:
        filled_in = f"applied_context_length={in_use}" if fits else f"applied_rope_parameters={applied}"
        asked = asked if not fits or config.rope_parameters is None else f"context_length={window}"
        raise ValueError(
            f"{asked} do not fit {filled_in}, which was filled in when this config made an adapter. Make a new "
            f"LongLoraConfig, or set applied_rope_parameters=None."
        )


def _are_within(given: dict[str, Any], applied: dict[str, Any]) -> bool:
    """Whether the parameters in use are the given ones; transformers adds and renames entries."""
    if is_nested(given):
        return all(
            parameters is None or (isinstance(applied.get(kind), dict) and _are_within(parameters, applied[kind]))
            for kind, parameters in given.items()
        )
    return all(applied[name] == value for name, value in given.items() if name in applied)

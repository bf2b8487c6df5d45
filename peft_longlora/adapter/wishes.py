"""The RoPE and the attention that an adapter wants. A model has one of each, so all its adapters must want the same."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.rope import state as rotary

RopeWish = dict[str, Any] | tuple[Any, ...] | None


def check_wishes(
    config: LongLoraConfig, model: PreTrainedModel, configs: dict[str, LongLoraConfig], called: str = "the new one"
) -> None:
    """Refuse an adapter that wants another RoPE or attention than an adapter on the model.

    Args:
        configs: those of all adapters by name. called: what to call the new one if it is not among them.

    Raises: ValueError.
    """
    new_name = next((repr(name) for name, each in configs.items() if each is config), called)
    for name, other in configs.items():
        if other is config:
            continue
        wishes = {
            "RoPE": [_wanted_rope(each, model, configs) for each in (other, config)],
            "attention": [wanted_attention(each, model) for each in (other, config)],
        }
        for what, (there, new) in wishes.items():
            if there != new:
                if isinstance(there, dict) and isinstance(new, dict):
                    there, new = _without_equal(there, new), _without_equal(new, there)
                raise ValueError(
                    f"Adapters {name!r} and {new_name} want different {what} of one model: {there} and {new}. A "
                    f"model can have only one. Give both adapters the same settings, or load each on its own model."
                )


def _without_equal(wish: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in wish.items() if name not in other or other[name] != value}


def _wanted_rope(config: LongLoraConfig, model: PreTrainedModel, configs: dict[str, LongLoraConfig]) -> RopeWish:
    """The RoPE that an adapter wants, equal for two configs that mean the same; None: the base's."""
    if config.applied_rope_parameters is not None:
        return config.applied_rope_parameters
    for other in configs.values():  # another adapter with the same fields already made it
        if other.applied_rope_parameters is not None and _fields_of(other) == _fields_of(config):
            return other.applied_rope_parameters
    window = rotary.rope_of(model, scaled=False).window
    if config.rope_parameters is None and (config.context_length or 0) <= window:
        return None
    return _fields_of(config)


def _fields_of(config: LongLoraConfig) -> tuple[Any, ...]:
    return config.context_length, config.rope_type, config.rope_parameters


def wanted_attention(config: LongLoraConfig, model: PreTrainedModel) -> dict[str, Any]:
    """The attention that an adapter wants, as arguments of `configure_attention`; equal if two mean the same."""
    is_full = config.attention_pattern == "full"  # then nothing else has an effect
    return dict(
        group_size=None if is_full else config.group_size_on(rotary.rope_of(model, scaled=False).window),
        pattern=config.attention_pattern,
        dense_layers=[] if is_full else sorted(set(config.dense_layers or ())),
        dense_every=0 if is_full else config.dense_every or 0,
        skip_positions=config.skip_positions and config.attention_pattern == "local",
        chosen_blocks=config.chosen_blocks if config.attention_pattern == "adaptive" else None,
    )

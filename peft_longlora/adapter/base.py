"""Whether a model is the base that an adapter was made for, by what the adapter's config says. Called by `fit`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.utils import logging

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.rules import plain
from peft_longlora.architecture import one_of, rows_of
from peft_longlora.rope import state as rotary
from peft_longlora.rope.parameters import is_nested, of_full_attention
from peft_longlora.rope.values import SCALING

logger = logging.get_logger(__name__)
_HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def check_base(config: LongLoraConfig, model: nn.Module) -> None:
    """Refuse an adapter that was made for another base, by the sizes and the RoPE that its config names.

    Raises: ValueError.
    """
    made_for = config.resolved_for
    if made_for not in (None, model.config.model_type):
        raise ValueError(
            f"This LongLoraConfig was filled in for {made_for}: its target_modules and modules_to_save are not those "
            f"of {model.config.model_type}. Make a new LongLoraConfig for each model."
        )
    base = rotary.rope_of(model, scaled=False)
    _check_layout(config, model)
    rows = rows_of(model.get_input_embeddings())
    if config.vocab_size is not None and config.train_embeddings and rows != config.vocab_size:
        raise ValueError(
            f"The adapter was made for a vocabulary of {config.vocab_size} tokens, but this model has {rows}. The "
            f"vocabulary is never resized: load the base that the adapter names "
            f"({config.base_model_name_or_path}), or call model.resize_token_embeddings({config.vocab_size}) "
            f"yourself if you know the extra tokens."
        )
    if _is_applied(config, base.rope_parameters) and config.base_context_length != base.window:
        raise ValueError(
            f"This model's RoPE is already scaled as the adapter scales it, to a window of {base.window} tokens: the "
            f"adapter was merged into it. Load the base that the adapter names ({config.base_model_name_or_path}), or "
            f"use this model without the adapter."
        )
    # Older adapters may hold the base's max_position_embeddings, which is not its window if it has linear scaling.
    if config.base_context_length not in (None, base.window, base.max_position_embeddings):
        raise ValueError(
            f"The adapter was made for a base with a window of {config.base_context_length} tokens "
            f"(max_position_embeddings), but this model has {base.window}. Load the base that the adapter names "
            f"({config.base_model_name_or_path}). For a new adapter make a new LongLoraConfig: this one was filled in "
            f"for another model."
        )
    made_on = config.base_rope_parameters or _unscaled(config)
    if difference := _differing(made_on, base.rope_parameters or {}):
        name, wanted, found = difference
        raise ValueError(
            f"The adapter was made for a base with {name}={wanted!r} in its rope_parameters, but this model has "
            f"{found!r}. Load the base that the adapter names ({config.base_model_name_or_path}). For a new adapter "
            f"make a new LongLoraConfig: this one was filled in for another model."
        )


def layout_of(model: nn.Module) -> dict[str, Any]:
    """What tells two bases apart whose weights have equal names and shapes: model_type and the layout of heads."""
    config = model.config.get_text_config()
    found = {name: one_of(config, name) for name in _HEADS}
    if found["head_dim"] is None and isinstance(found["num_attention_heads"], int):
        found["head_dim"] = config.hidden_size // found["num_attention_heads"]
    heads = {name: value for name, value in found.items() if isinstance(value, int)}
    return {"model_type": config.model_type, **heads}


def _check_layout(config: LongLoraConfig, model: nn.Module) -> None:
    """Refuse a base that cuts its projections into other heads; warn of another model_type.

    Types may compute the same (a copy of llama under another name), so only a person knows whether that is right.
    """
    wanted, found = config.base_layout or {}, layout_of(model)
    for name in _HEADS:
        if name in wanted and name in found and wanted[name] != found[name]:
            raise ValueError(
                f"The adapter was made for a base with {name}={wanted[name]!r}, but this model has {found[name]!r}: "
                f"its heads are others, even where weights have equal shapes. Load the base that the adapter names "
                f"({config.base_model_name_or_path}). For a new adapter make a new LongLoraConfig: this one was "
                f"filled in for another model."
            )
    if wanted.get("model_type", found["model_type"]) != found["model_type"]:
        logger.warning(
            f"The adapter was made for a base of model_type {wanted['model_type']!r}, and this model is "
            f"{found['model_type']!r}. Equal names and shapes do not make them equal: load the base that the adapter "
            f"names ({config.base_model_name_or_path}), unless you know that this one computes the same."
        )


def _unscaled(config: LongLoraConfig) -> dict[str, Any]:
    """The base's own entries of applied_rope_parameters, for an adapter that is older than base_rope_parameters."""
    applied, given = config.applied_rope_parameters or {}, config.rope_parameters or {}
    if is_nested(applied) or is_nested(given):
        return {}
    changed = SCALING | given.keys() | ({"rope_theta"} if config.rope_type == "ntk" else set())
    return {name: value for name, value in applied.items() if name not in changed}


def _differing(wanted: dict[str, Any], found: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first entry in which the rope_parameters of two bases differ: its name and both values.

    Entries that only one of them has come from another version of transformers.
    """
    if not is_nested(wanted) and is_nested(found):
        found = of_full_attention(found)
    for name, value in wanted.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            if difference := _differing(value, found[name]):
                return difference
        elif name in found and plain(found[name]) != plain(value):
            return name, value, found[name]
    return None


def _is_applied(config: LongLoraConfig, parameters: dict[str, Any] | None) -> bool:
    """Whether a model's rope_parameters are those of the adapter."""
    applied = config.applied_rope_parameters
    if applied is None or config.base_context_length is None or not parameters:
        return False
    return applied == (parameters if is_nested(applied) else of_full_attention(parameters))

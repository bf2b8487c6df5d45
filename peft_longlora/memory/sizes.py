"""Read a model's config.json, and check its sizes before transformers computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

SIZES = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "vocab_size", "head_dim"),
    *("num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads"),
)
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")


def read_config(model: str) -> PretrainedConfig:
    """The config in a folder or on the Hub.

    Args:
        model: folder or Hub id.

    Raises:
        ValueError: the file holds no object, as `check_sizes`, or transformers refuses a value.
        OSError: there is no such model.
    """
    try:
        config = PretrainedConfig.get_config_dict(model)[0]
    except TypeError:  # transformers 5.17 writes into what it has read, whatever that is
        config = None
    if not isinstance(config, Mapping):
        raise ValueError(f"{model}: config.json must hold an object of fields, and does not.")
    check_sizes(config, model)
    try:
        return AutoConfig.from_pretrained(model)
    except StrictDataclassError as error:
        raise ValueError(f"{model}: transformers refuses its config.json. {error}") from error


def check_sizes(config: Mapping[str, Any], model: str) -> None:
    """Refuse sizes that are no numbers, or too small; sizes that layers differ in are lists, and are not looked at.

    Args:
        config: what the file holds.
        model: folder or Hub id, for the message.

    Raises:
        ValueError: a size is not a whole number, is below 1, or is below 0 if it counts experts.
    """
    file = str(Path(model) / "config.json") if Path(model).is_dir() else f"{model}: config.json"
    for part in (config, *(config[name] for name in ("text_config", "llm_config") if config.get(name))):
        for name in (*SIZES, *COUNTS):
            value, least = part.get(name), 0 if name in COUNTS else 1
            if value is None or isinstance(value, list | dict):
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"{file}: {name}={value!r} must be a whole number of {least} or more.")

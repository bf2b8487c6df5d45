"""The rules for values of a `LongLoraConfig`, checked before anything reads them.

An adapter_config.json may hold anything; PEFT would fail later, in an error that names no field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from peft import LoraConfig

from peft_longlora.kernels.patterns import BLOCK_PATTERNS, PATTERNS
from peft_longlora.rope.values import MOST_TOKENS

# The version of the file format. It grows when an older package would misread new files.
FORMAT_VERSION = 1
_LENGTHS = (
    *("context_length", "group_size"),
    *("base_context_length", "applied_context_length", "applied_group_size", "vocab_size"),
)
# With PEFT's own: the text "false" is true in Python, so a damaged file would switch them on.
_SWITCHES = (
    "skip_positions",
    "train_embeddings",
    "train_norms",
    *(each.name for each in fields(LoraConfig) if each.type in (bool, "bool")),
)
_RANK = 2**20  # no weight has as many rows


def plain(value: Any) -> Any:
    """Convert numbers of numpy and torch to Python's own, which JSON can hold."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, int | float) or not hasattr(value, "item") or getattr(value, "ndim", 1):
        return value
    return value.item()


def _is_length(value: Any) -> bool:
    return value is None or (type(value) is int and 1 <= value <= MOST_TOKENS)


def _is_ratio(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None or (isinstance(value, dict) and all(isinstance(k, str) and is_right(v) for k, v in value.items()))
    )


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value))


def _are_indices(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(type(i) is int and i >= 0 for i in value))


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _are_indices(value)


# For each field: its rule, and a function that checks a value.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format_version": (
        f"must be a whole number, 1 to {FORMAT_VERSION}. Leave it out of a new config; an adapter_config.json that "
        f"says so was changed by hand or is damaged: get it again",
        lambda value: type(value) is int and value >= 1,
    ),
    **dict.fromkeys(_LENGTHS, ("must be a positive number of tokens, at most 2**40, or None", _is_length)),
    **dict.fromkeys(_SWITCHES, ("must be True or False", lambda value: isinstance(value, bool))),
    **dict.fromkeys(
        ("applied_rope_parameters", "base_rope_parameters", "base_layout"),
        (
            "must be the dict that was filled in when the adapter was made, or None",
            lambda value: isinstance(value, dict | None),
        ),
    ),
    "group_size_ratio": (
        "is outside (0, 1]: it is a fraction of the window. Use group_size for a number of tokens",
        _is_ratio,
    ),
    "attention_pattern": (
        f"is unknown. Use one of {', '.join(map(repr, (*PATTERNS, *BLOCK_PATTERNS)))}",
        lambda value: value in (*PATTERNS, *BLOCK_PATTERNS),
    ),
    "r": (f"must be a whole number, 1 or more and at most {_RANK}", _is_rank),
    "lora_alpha": ("must be a finite number: LoRA's product is multiplied by lora_alpha / r", _is_number),
    "lora_dropout": (
        "must be a number, 0 or more and below 1",
        lambda value: _is_number(value) and 0 <= value < 1,
    ),
    "bias": ("is unknown. Use one of 'none', 'all', 'lora_only'", lambda value: value in ("none", "all", "lora_only")),
    "rank_pattern": (
        f"must map names of modules to whole numbers, 1 or more and at most {_RANK}",
        _is_pattern_of(_is_rank),
    ),
    "alpha_pattern": ("must map names of modules to numbers", _is_pattern_of(_is_number)),
    **dict.fromkeys(
        ("target_modules", "exclude_modules"),
        (
            "must be a list of names, a regular expression, or None",
            lambda value: isinstance(value, str) or _are_names(value),
        ),
    ),
    "target_parameters": (
        "must be a list of names, or None",
        lambda value: value is None or (not isinstance(value, set) and _are_names(value)),
    ),
    "init_lora_weights": (
        "must be True, False, or the name of an initialisation, such as 'gaussian'",
        lambda value: isinstance(value, bool | str | None),
    ),
    "layers_to_transform": (
        "must be a layer's index, 0 or more, a list of them, or None",
        lambda value: value is None or _are_indices(value if isinstance(value, list) else [value]),
    ),
    "layer_replication": (
        "must be a list of pairs of layer indices, [first, the one after the last], or None",
        lambda value: value is None or (isinstance(value, list) and all(map(_is_range, value))),
    ),
    "modules_to_save": ("must be a list of names, or None", _are_names),
    "alora_invocation_tokens": (
        "must be a list of tokens, each a whole number, 0 or more; or None",
        lambda value: value is None or (value != [] and _are_indices(value)),
    ),
    **dict.fromkeys(
        ("base_model_name_or_path", "revision", "peft_version"),
        ("must be text, or None", lambda value: isinstance(value, str | None)),
    ),
    "auto_mapping": ("must be a dict, or None", lambda value: isinstance(value, dict | None)),
    "dense_layers": ("must be a list of layer indices, 0 or more", _are_indices),
}

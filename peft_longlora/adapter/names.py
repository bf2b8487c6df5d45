"""Names in a new config that match nothing in its model: a misspelt one would train less than was asked for.

PEFT drops what matches nothing, and people give lists for several families of models. So a field of which nothing
matches is refused, and a name that matches nothing beside others that do is a warning. Called by `model`, before it
adds embeddings and norms to modules_to_save. Adapters that are loaded are not checked: their weights say what there is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.utils import logging

from peft_longlora.adapter.config import LongLoraConfig

logger = logging.get_logger(__name__)


def check_names(config: LongLoraConfig, model: nn.Module) -> None:
    """Refuse fields of which no name matches, and warn of single names that match nothing.

    Raises: ValueError.
    """
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    parameters = [name.replace(".base_layer", "") for name, _ in model.named_parameters(remove_duplicate=False)]
    is_list = isinstance(config.target_modules, list | tuple | set)
    _check("target_modules", config.target_modules if is_list else (), modules, is_last_of)
    _check("target_parameters", config.target_parameters or (), parameters, is_last_of)
    _check("modules_to_save", config.modules_to_save or (), modules, is_end_of)
    excluded = config.exclude_modules or ()
    is_regex = isinstance(excluded, str)
    _check("exclude_modules", [excluded] if is_regex else excluded, modules, re.fullmatch if is_regex else is_last_of)
    if isinstance(config.trainable_token_indices, dict):
        _check("trainable_token_indices", config.trainable_token_indices, modules, is_last_of)
    targets = [*_targets(config, modules), *(parameters if config.target_parameters else ())]
    _check_layers(config, targets, modules)
    for field in ("rank_pattern", "alpha_pattern"):
        _check(field, getattr(config, field), targets, lambda key, name: re.match(rf"(.*\.)?({key})$", name))


def _targets(config: LongLoraConfig, modules: list[str]) -> list[str]:
    """The modules that get LoRA; all of them where PEFT chooses."""
    if not config.target_modules or config.target_modules == "all-linear":
        return modules
    return [name for name in modules if check_target_module_exists(config, name)]


def is_last_of(entry: str, name: str) -> bool:
    """Whether PEFT takes a module of this name for an entry of target_modules or exclude_modules that is a list."""
    return name == entry or name.endswith(f".{entry}")


def is_end_of(entry: str, name: str) -> bool:
    """Whether PEFT takes a module of this name for an entry of modules_to_save."""
    return name.endswith(entry)


def _check(field: str, entries: Iterable[str], names: list[str], match: Callable[[str, str], Any]) -> None:
    entries = list(entries)
    lost = [entry for entry in sorted(entries) if not any(match(entry, name) for name in names)]
    if not lost:
        return
    said = ", ".join(repr(entry) + _nearest(entry, names) for entry in lost)
    if len(lost) == len(entries):
        raise ValueError(
            f"{field}={entries!r} has no effect: this model has nothing of that name: {said}. Correct it, or leave it "
            f"out."
        )
    logger.warning(f"{field}: this model has nothing of the name {said}; the other names are used.")


def _nearest(entry: str, names: list[str]) -> str:
    """In brackets, the names of as many parts that are spelt most like an entry; "" if none is."""
    parts = entry.count(".") + 1
    ends = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names)
    near = get_close_matches(entry, list(ends), n=2)
    return f" (is it {' or '.join(map(repr, near))}?)" if near else ""


def _check_layers(config: LongLoraConfig, targets: list[str], modules: list[str]) -> None:
    """Refuse indices of layers that are not there."""
    wanted = config.layers_to_transform
    wanted = [] if wanted is None else [wanted] if isinstance(wanted, int) else wanted
    if lost := [index for index in wanted if not any(f".{index}." in name for name in targets)]:
        there = sorted({int(number) for name in modules for number in re.findall(r"(?<=\.)\d+(?=\.)", name)})
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r}: there is nothing to train in layers "
            f"{', '.join(map(str, lost))} of this model, which has layers {there[0]} to {there[-1]}. Correct it."
        )

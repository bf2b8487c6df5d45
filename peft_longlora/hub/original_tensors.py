"""The two pickles of the original project: they are read, and checked against each other and the config.

The base is not needed. A fault is said with the name of the file that has it, before the new adapter is written.
"""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import check_numbers
from peft_longlora.adapter.regexes import check_patterns_on
from peft_longlora.hub.export import PREFIX

_AGAIN = "The file is incomplete or belongs to another adapter_config.json: get both again from their authors."
_LAYER = re.compile(r"\.(\d+)\.")
Tensors = dict[str, torch.Tensor]


def load_tensors(path: Path, place: str) -> Tensors:
    """The tensors of a pickle by their names in an adapter's file.

    Args: place: what to call the file where its tensors are wrong.

    Raises: ValueError: it holds anything but tensors, or what no weights are.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than tensors, which could run code when opened "
            f"({first}). Get it again from its authors; do not open it with weights_only=False."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold a dict of tensors, as the original project writes it.")
    tensors = {
        PREFIX + key.removeprefix(PREFIX).replace(".default.", "."): tensor
        for key, tensor in content.items()
        if "rotary_emb" not in key  # a buffer of old transformers, which the config's RoPE replaces
    }
    check_numbers(tensors.items(), place)
    return tensors


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever precision."""
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def split(weights: Tensors, trainable: Tensors, weights_place: str, trainable_place: str) -> tuple[Tensors, Tensors]:
    """LoRA's tensors, and the copies of whole modules, which newer versions of peft also put among the former.

    Raises: ValueError: the two files have one tensor with two values.
    """
    lora = {key: tensor for key, tensor in weights.items() if ".lora_" in key}
    copies = {key: tensor for key, tensor in weights.items() if key not in lora}
    for key in copies.keys() & trainable.keys():
        if not are_equal(copies[key], trainable[key]):
            raise ValueError(
                f"{weights_place} and {trainable_place} both hold {key}, with different values. They belong to two "
                f"adapters, or to two checkpoints of one: get both files again from one place."
            )
    return lora, copies | trainable


def check_lora(config: LongLoraConfig, lora: Tensors, layers: set[str], place: str) -> None:
    """Refuse LoRA's tensors if one is missing, too many, or of another rank than the config says.

    Args: layers: `layers_of` all tensors of both files. place: what to call the file.

    Raises: ValueError.
    """
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in lora.items():
        module, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        parts[module][f"lora_{part}"] = tensor
    check_patterns_on(config, list(parts))
    wanted = ["lora_A.weight", "lora_B.weight"] + ["lora_magnitude_vector"] * config.use_dora
    targets = config.target_modules
    for module, found in parts.items():
        if targets != "all-linear" and not check_target_module_exists(config, module):
            raise ValueError(
                f"{place} holds LoRA of {module}, which the config (target_modules={_listed(targets)}, "
                f"layers_to_transform={config.layers_to_transform!r}, exclude_modules={config.exclude_modules!r}, "
                f"modules_to_save={config.modules_to_save!r}) leaves out. {_AGAIN}"
            )
        if missing := [part for part in wanted if part not in found]:
            raise ValueError(f"{place} has no {module}.{missing[0]}, but other tensors of {module}. {_AGAIN}")
        if extra := [part for part in found if part not in wanted]:
            raise ValueError(
                f"{place} holds {module}.{extra[0]}, which an adapter with use_dora={config.use_dora} does not have. "
                f"{_AGAIN}"
            )
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
        a, b = found["lora_A.weight"], found["lora_B.weight"]
        if (a.ndim, b.ndim) != (2, 2) or not a.shape[0] == b.shape[1] == rank:
            raise ValueError(
                f"{place}: {module} has lora_A of shape {tuple(a.shape)} and lora_B of {tuple(b.shape)}, but the "
                f"config says rank {rank} (r or rank_pattern), so {rank} rows and {rank} columns. {_AGAIN}"
            )
    idle = [] if isinstance(targets, str) else [t for t in targets if not any(f".{m}".endswith(f".{t}") for m in parts)]
    if idle or not parts:
        raise ValueError(f"{place} has no LoRA of {sorted(idle) or targets}, which target_modules names. {_AGAIN}")
    _check_layers(parts, layers, place, lambda module: bool(check_target_module_exists(config, module)))


def check_copies(config: LongLoraConfig, whole: Tensors, layers: set[str], place: str) -> None:
    """Refuse the copies of whole modules if one is missing, or is none that the config names.

    Args: as those of `check_lora`.

    Raises: ValueError.
    """
    modules = {key: key.removeprefix(PREFIX).rpartition(".")[0] for key in whole}
    embeddings = [key for key, module in modules.items() if module == "model.embed_tokens"]
    norms = [key for key, module in modules.items() if "norm" in module.rpartition(".")[2]]
    named = {name: [key for key, module in modules.items() if f".{name}." in f".{module}."] for name in _saved(config)}
    cure = "If the original was told to train less (--trainable_params of its get_trainable_weights.py), give"
    if config.train_embeddings and not embeddings:
        raise ValueError(
            f"{place} has no embed_tokens.weight, which the original trains. {_AGAIN} {cure} trainable_params='norm'."
        )
    if config.train_norms and not any(_LAYER.search(key) is None for key in norms):
        raise ValueError(
            f"{place} has no {'last norm' if norms else 'norms'}, which the original trains. {_AGAIN} {cure} "
            f"trainable_params='embed'."
        )
    for name, keys in named.items():
        if not keys:
            raise ValueError(
                f"modules_to_save={_listed(config.modules_to_save)} names {name!r}, but neither {place} nor the other "
                f"file has a tensor of it. {_AGAIN}"
            )
    kept = {key for keys in named.values() for key in keys}
    kept.update(embeddings if config.train_embeddings else (), norms if config.train_norms else ())
    if foreign := sorted(whole.keys() - kept):
        raise ValueError(
            f"{place} holds {len(foreign)} tensors that the conversion would drop, the first being {foreign[0]}: it "
            f"is no LoRA, and neither trainable_params nor modules_to_save names it. If the adapter computes with it, "
            f"name its module in modules_to_save of adapter_config.json, or add 'embed' or 'norm' to trainable_params; "
            f"otherwise take it out of the file."
        )
    if config.train_norms:
        _check_layers([key.removeprefix(PREFIX) for key in norms], layers, place, lambda name: True)


def layers_of(names: Iterable[str]) -> set[str]:
    """The numbers of the layers that tensors belong to."""
    return {match[1] for name in names if (match := _LAYER.search(name))}


def _check_layers(names: Iterable[str], layers: set[str], place: str, is_wanted: Callable[[str], bool]) -> None:
    """Refuse names of which one layer has less than another, unless the config leaves the layer out."""
    found = set(names)
    for name in sorted(found):
        if (match := _LAYER.search(name)) is None:
            continue
        for layer in sorted(layers, key=int):
            other = f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}"
            if other not in found and is_wanted(other):
                raise ValueError(f"{place} has {name}, but no {other}. {_AGAIN}")


def _saved(config: LongLoraConfig) -> list[str]:
    return sorted(config.modules_to_save or ())


def _listed(value: Any) -> str:
    return repr(sorted(value) if isinstance(value, set) else value)

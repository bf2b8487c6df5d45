"""Converts adapters of the original project."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.utils import logging

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import FileMissing, find, hub_id, read_json
from peft_longlora.hub.export import PREFIX
from peft_longlora.hub.original_fields import carried_fields
from peft_longlora.hub.original_tensors import (
    Tensors,
    are_equal,
    check_copies,
    check_lora,
    layers_of,
    load_tensors,
    split,
)

WEIGHTS, TRAINABLE = "adapter_model.bin", "trainable_params.bin"
EMBEDDINGS, HEAD = f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}lm_head.weight"

logger = logging.get_logger(__name__)


def convert_original_adapter(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    context_length: int | None = None,
    factor: float | None = None,
    base_model: str | None = None,
    base_context_length: int = 4096,
    rope_theta: float = 10000.0,
    vocab_size: int = 32000,
    trainable_params: str = "embed,norm",
    revision: str | None = None,
    token: bool | str | None = None,
) -> LongLoraConfig:
    """Convert an adapter of the original project (Llama-2-7b-longlora-8k ... 70b-32k) into one of this package.

    Args:
        source: a folder, or a repository's id, with adapter_config.json, adapter_model.bin, trainable_params.bin.
        folder: for the new adapter.
        context_length: the window it was trained for, tokens. None: read from the name ("...-32k" is 32768).
        factor: RoPE's factor, instead of context_length. None: context_length divided by base_context_length, rounded
            up to a whole number, as the original does when it trains.
        base_model: the base of the new adapter. None: the base that adapter_config.json names, often a folder of its
            authors.
        base_context_length: the base's own window, tokens; the default is Llama 2's, as are the next two.
        rope_theta: the base of the base's RoPE.
        vocab_size: rows of the base's embedding. Rows beyond them are the [PAD] that the original appends; they are
            dropped, with a warning.
        trainable_params: what was trained besides LoRA, as the original's script of that option takes it: 'embed,norm',
            'embed', 'norm' or ''.
        revision: of a repository: a branch, a tag or a commit.
        token: of the Hub. None: the one that is stored.

    Returns:
        The new adapter's config.

    Raises:
        ValueError: a file is missing, holds more than tensors, or does not fit the other files; a field of the config
            changes what the adapter computes and cannot be carried over; or the window is not known.

    Source: get_trainable_weights.py and merge_lora_weights_and_save_hf_model.py of github.com/dvlab-research/LongLoRA.
    """
    label = str(source)
    source = _original_files(label, revision, token)
    factor = _factor(label, factor, context_length, base_context_length)
    window = round(factor * base_context_length)
    old = read_json(source / CONFIG_NAME)
    kept = carried_fields(old, f"{label}/{CONFIG_NAME}")
    base = base_model or old.get("base_model_name_or_path")
    trained = _trained(trainable_params)
    weights_place, trainable_place = f"{label}/{WEIGHTS}", f"{label}/{TRAINABLE}"
    weights = load_tensors(source / WEIGHTS, weights_place)
    lora, whole = split(weights, load_tensors(source / TRAINABLE, trainable_place), weights_place, trainable_place)
    for key in whole.keys() & {EMBEDDINGS, HEAD}:
        whole[key] = _drop_added_rows(whole[key], vocab_size, f"{trainable_place}: {key}")
    is_tied = "embed" in trained and _is_tied(base)
    if is_tied:
        _take_out_tied_head(kept, whole, label)
    try:
        config = LongLoraConfig(
            **kept,
            base_model_name_or_path=base,
            context_length=window,
            rope_type="linear",
            train_embeddings="embed" in trained,
            train_norms="norm" in trained,
            base_context_length=base_context_length,
            applied_rope_parameters={"rope_type": "linear", "factor": factor, "rope_theta": rope_theta},
            vocab_size=vocab_size if "embed" in trained else None,
            inference_mode=True,
        )
    except ValueError as error:
        raise ValueError(f"{label}/{CONFIG_NAME}, or an argument of the conversion: {error}") from error
    layers = layers_of([*lora, *whole])
    check_lora(config, lora, layers, weights_place)
    check_copies(config, whole, layers, trainable_place)
    if is_tied:  # in this package's adapters a tied output layer has its own copy of the one weight
        whole[HEAD] = whole[EMBEDDINGS]
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous().clone() for key, tensor in (lora | whole).items()}
    save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    if hub_id(base) is None and not os.path.isdir(str(base)):
        logger.warning(
            f"{label}/{CONFIG_NAME} names the base {base!r}, which is neither a folder here nor an id on the Hub. Give "
            f"base_model, such as 'meta-llama/Llama-2-7b-hf', so that PEFT can find it."
        )
    return config


def _original_files(label: str, revision: str | None, token: bool | str | None) -> Path:
    """The folder with an original adapter's files, downloaded if necessary."""
    options = {} if os.path.isdir(label) else {"revision": revision, "token": token}
    try:
        paths = [find(label, name, **options) for name in (CONFIG_NAME, WEIGHTS, TRAINABLE)]
    except FileMissing as error:
        raise ValueError(
            f"{error} So it is not an adapter of the original LongLoRA project. (Names that end in -ft belong to "
            f"whole models: load these without converting.)"
        ) from error
    return paths[0].parent


def _factor(label: str, factor: float | None, context_length: int | None, base_context_length: int) -> float:
    if factor is not None and context_length is not None:
        raise ValueError(f"factor={factor} and context_length={context_length} say the same. Give one of them.")
    if factor is None:
        window = _window_from_name(label) if context_length is None else context_length
        if window <= base_context_length:
            raise ValueError(f"context_length={window} is not above the base's window of {base_context_length} tokens.")
        factor = math.ceil(window / base_context_length)
    if factor <= 1:
        raise ValueError(
            f"factor={factor} is not above 1, so it would not extend the window. Give the factor of its training."
        )
    return float(factor)


def _window_from_name(label: str) -> int:
    found = re.findall(r"(\d+)k(?![a-z])", Path(label).name.lower())
    if len(found) != 1:
        raise ValueError(
            f"{label} does not have its window in its name, as 'Llama-2-7b-longlora-32k' has. Give context_length."
        )
    return int(found[0]) * 1024


def _trained(trainable_params: str) -> set[str]:
    trained = {name.strip() for name in trainable_params.split(",")} - {""}
    if trained - {"embed", "norm"}:
        raise ValueError(
            f"trainable_params={trainable_params!r} must be 'embed,norm', 'embed', 'norm' or ''. Name other modules in "
            f"modules_to_save of adapter_config.json."
        )
    return trained


def _is_tied(base: str | None) -> bool:
    """Whether a base that lies on the disk ties its output layer to its embeddings. Others are not asked."""
    if not os.path.isfile(os.path.join(str(base), "config.json")):
        return False
    try:
        return bool(AutoConfig.from_pretrained(base).tie_word_embeddings)
    except (OSError, ValueError, KeyError):  # loading the base will say what is wrong with it
        return False


def _take_out_tied_head(kept: dict[str, Any], whole: Tensors, label: str) -> None:
    """Leave the output layer of a tied base to the embeddings, whose weight it has."""
    if isinstance(saved := kept.get("modules_to_save"), list):
        kept["modules_to_save"] = [name for name in saved if name != "lm_head"] or None
    head = whole.pop(HEAD, None)
    if head is not None and EMBEDDINGS in whole and not are_equal(head, whole[EMBEDDINGS]):
        raise ValueError(
            f"{label}: the files hold {HEAD} and {EMBEDDINGS} with different values, but the base ties the two to one "
            f"weight (tie_word_embeddings in its config.json). Give the base_model that the adapter was trained on."
        )


def _drop_added_rows(weight: torch.Tensor, rows: int, what: str) -> torch.Tensor:
    if weight.shape[0] < rows:
        raise ValueError(f"{what} has {weight.shape[0]} rows, but the base has {rows}. Give the base's own vocab_size.")
    if weight.shape[0] > rows:
        logger.warning(
            f"{what} has {weight.shape[0]} rows, the base has {rows}. The other rows, which the original appends for "
            f"padding, are dropped. Pad with a token of the base."
        )
    return weight[:rows]

"""Converts adapters of the original project."""

from __future__ import annotations

import math
import os
import pickle
import re
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers.utils import logging

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import FileMissing, find, hub_id, read_json
from peft_longlora.hub.export import PREFIX

WEIGHTS, TRAINABLE = "adapter_model.bin", "trainable_params.bin"

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
        revision: of a repository: a branch, a tag or a commit.
        token: of the Hub. None: the one that is stored.

    Returns:
        The new adapter's config.

    Raises:
        ValueError: a file is missing, holds more than tensors, or does not fit, or the window is not known.

    Source: get_trainable_weights.py and merge_lora_weights_and_save_hf_model.py of github.com/dvlab-research/LongLoRA.
    """
    label = str(source)
    source = _original_files(label, revision, token)
    factor = _factor(label, factor, context_length, base_context_length)
    window = round(factor * base_context_length)
    old = read_json(source / CONFIG_NAME)
    if old.get("peft_type") != "LORA" or old.get("bias", "none") != "none":
        raise ValueError(
            f"{label}/{CONFIG_NAME}: peft_type={old.get('peft_type')!r}, bias={old.get('bias')!r}; the original's "
            f"adapters have 'LORA' and 'none'."
        )
    lora = _load_tensors(source / WEIGHTS)
    whole = {
        PREFIX + key.removeprefix(PREFIX): tensor
        for key, tensor in _load_tensors(source / TRAINABLE).items()
        if "rotary_emb" not in key
    }
    embeddings = [key for key in whole if key.endswith("embed_tokens.weight")]
    for key in embeddings:
        whole[key] = _drop_added_rows(whole[key], vocab_size, f"{label}/{TRAINABLE}: {key}")
    config = LongLoraConfig(
        **{key: old[key] for key in ("r", "lora_alpha", "lora_dropout", "target_modules", "task_type") if key in old},
        base_model_name_or_path=base_model or old.get("base_model_name_or_path"),
        context_length=window,
        rope_type="linear",
        train_embeddings=bool(embeddings),
        train_norms=len(whole) > len(embeddings),
        base_context_length=base_context_length,
        applied_rope_parameters={
            "rope_type": "linear",
            "factor": factor,
            "rope_theta": rope_theta,
        },
        vocab_size=vocab_size if embeddings else None,
        inference_mode=True,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {key.replace(".default.", "."): tensor for key, tensor in lora.items()} | whole
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    base = config.base_model_name_or_path
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
        raise ValueError(f"factor={factor} is not above 1, so it would not extend the window.")
    return float(factor)


def _window_from_name(label: str) -> int:
    found = re.findall(r"(\d+)k(?![a-z])", Path(label).name.lower())
    if len(found) != 1:
        raise ValueError(
            f"{label} does not have its window in its name, as 'Llama-2-7b-longlora-32k' has. Give context_length."
        )
    return int(found[0]) * 1024


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle. A pickle that holds anything else is refused."""
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
    return content


def _drop_added_rows(weight: torch.Tensor, rows: int, what: str) -> torch.Tensor:
    if weight.shape[0] < rows:
        raise ValueError(f"{what} has {weight.shape[0]} rows, but the base has {rows}. Give the base's own vocab_size.")
    if weight.shape[0] > rows:
        logger.warning(
            f"{what} has {weight.shape[0]} rows, the base has {rows}. The other rows, which the original appends for "
            f"padding, are dropped. Pad with a token of the base."
        )
    return weight[:rows]

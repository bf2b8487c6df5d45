"""Settings of generation, and the size of a cache. The chat and the evaluation share them, so that they do not
differ."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig


def decoding(
    max_new_tokens: int,
    *,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    pad_token_id: int | None = None,
    **more: Any,
) -> GenerationConfig:
    """Settings of `generate` that a model's own defaults cannot change, except the tokens that end an answer.

    Args:
        max_new_tokens, min_new_tokens: tokens of the answer.
        temperature: with 0 always the most likely token. top_p: nucleus sampling, for a temperature above 0.
        pad_token_id: None: token 0, which is never used because there is only one row.
        more: further fields of `GenerationConfig`.
    """
    if temperature > 0:
        choice = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    else:
        choice = dict(do_sample=False, temperature=1.0, top_p=1.0, top_k=50)  # transformers warns about other values
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0 if pad_token_id is None else pad_token_id,
        **choice,
        **more,
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys, values and states in a transformers cache, on any device; a tensor counts once."""
    names = ("keys", "values", "_quantized_keys", "_quantized_values", "conv_states", "recurrent_states")
    held = {
        id(part): part for layer in cache.layers for name in names if (part := getattr(layer, name, None)) is not None
    }
    return sum(map(_nbytes, held.values()))


def _nbytes(value: Any) -> int:
    """Bytes of a tensor, of the parts of a packed tensor (a subclass), or of a container of tensors."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__") and type(value) is not torch.Tensor:
            return sum(_nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0

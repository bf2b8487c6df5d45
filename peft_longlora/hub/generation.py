"""Settings of generation, and the size of a cache. The chat and the evaluation share them, so that they do not
differ."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
OWN = ("do_sample", *SAMPLING, "repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids")


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


def own_decoding(
    model: Any,
    max_new_tokens: int,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    pad_token_id: int | None = None,
) -> GenerationConfig:
    """Settings of `generate` as the model's makers chose them (its generation_config), where nothing else is asked for.

    Args:
        max_new_tokens, pad_token_id: as for `decoding`.
        temperature: None: the model's own; greedy, if its makers chose no sampling. 0: greedy.
        top_p, repetition_penalty: None: the model's own.
    """
    made = getattr(model, "generation_config", None)
    own = {name: value for name in OWN if (value := getattr(made, name, None)) is not None}
    asked = dict(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty)
    own |= {name: value for name, value in asked.items() if value is not None}
    if temperature is not None:
        own["do_sample"] = temperature > 0
    if own.get("do_sample"):
        choice = {"temperature": 1.0, "top_p": 1.0, "top_k": 0 if temperature is not None else 50}
        choice |= {name: own[name] for name in SAMPLING if name in own}
    else:
        choice = dict(temperature=1.0, top_p=1.0, top_k=50)  # transformers warns about other values
    kept = {name: value for name, value in own.items() if name not in SAMPLING}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        pad_token_id=0 if pad_token_id is None else pad_token_id,
        **{"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, **kept, **choice},
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

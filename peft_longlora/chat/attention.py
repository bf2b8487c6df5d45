"""Passages that an answer attended to most, from the attention of the answer's tokens, one layer at a time.

The answer's tokens are forwarded once more behind the cached keys of everything before them. This uses eager attention,
because only eager attention returns its weights. Of each layer's (H, A, T) weights (A tokens of the answer, T of the
row) only the mean over heads and answer tokens is kept, so nothing of size T x T ever exists. Called by
conversation.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from peft_longlora.architecture import find_attention_modules, is_local_layer
from peft_longlora.chat.dialogue import Dialogue
from peft_longlora.chat.kvcache import KVCache
from peft_longlora.chat.passages import Passage, make_passage, span_of

LAYERS = 4  # the last ones: their attention goes to what the model is about to say
SINKS = 4  # first tokens of a row, which attract attention whatever they say (arXiv:2309.17453)
WEIGHTS = 2**26  # numbers of attention weights in memory at a time


@torch.no_grad()
def document_attention(kv: KVCache, row: list[int], start: int) -> torch.Tensor:
    """Mean attention of an answer's tokens to every token before the answer.

    Args:
        kv: a cache on the model; afterwards it holds the row without its last token.
        row: prompt and answer. start: where the answer begins.

    Returns:
        (start,) float32 on the CPU: mean over the last layers with full attention, their heads, and the rows that
        predicted the answer's tokens (those at start - 1 and after it).
    """
    kv.fill(row[: start - 1])
    config, layers = kv.model.config.get_text_config(), list(find_attention_modules(kv.model).values())
    layers = ([layer for layer in layers if not is_local_layer(layer, config)] or layers)[-LAYERS:]
    total = torch.zeros(start, device=kv.model.device)

    def add(module: nn.Module, args: Any, output: Any) -> None:
        # (1, H, A, T), rows that sum to one
        total.add_(output[1][0, :, :, :start].float().mean(0).sum(0).to(total.device))

    hooks = [layer.register_forward_hook(add) for layer in layers]
    try:
        with _eager(kv.model):
            kv.append(row[start - 1 : -1], max(1, WEIGHTS // (config.num_attention_heads * len(row))))
    finally:
        for hook in hooks:
            hook.remove()
    return (total / (len(layers) * (len(row) - start))).cpu()


def top_passages(scores: torch.Tensor, dialogue: Dialogue, count: int) -> list[Passage]:
    """The spans (`span_of`) with the most attention; no two of them overlap.

    Args:
        scores: (tokens of the document,), as `document_attention` gives them.
    """
    scores = scores.clone()
    scores[: max(0, SINKS - len(dialogue.head))] = 0
    whole = scores.sum().clamp(min=torch.finfo(torch.float32).tiny)
    width = span_of(len(scores))
    sums = scores.unfold(0, width, 1).sum(-1)
    found = []
    while len(found) < count and sums.max() > 0:
        first = int(sums.argmax())
        share = float(sums[first] / whole)
        sums[max(0, first - width + 1) : first + width] = 0
        passage = make_passage(dialogue, first, width, f"{share:.1%} of the attention to the document", share)
        found += [passage] if passage else []
    return found


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Eager attention within the block."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)

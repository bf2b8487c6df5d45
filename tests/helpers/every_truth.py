"""What a supported model is compared with: plain transformers, each document in a row of its own.

`truth_attention` gives every layer with plain causal attention the dense mask of `peft_longlora.reference`. It needs no
mask of documents, because it gets no packed or padded rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peft_longlora.reference import s2_attention_reference
from peft_longlora.rope.values import SCALING
from tests.helpers.every_config import TEXT_TOKENS

GROUP, LENGTH = 16, 100  # tokens
DOCUMENTS = (70, 9, 21)
PADDED = 71
TRUTH = "every_truth"  # its name as an attention of transformers


class Truth:
    """The switch of `truth_attention`, and the number of layers to which it gave the mask of the definition."""

    is_sparse = True
    count = 0


def truth_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    rows, length = query.shape[0], query.shape[2]
    is_causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False
    causal = torch.ones(length, key.shape[2], dtype=torch.bool).tril(key.shape[2] - length)
    mask = causal if attention_mask is None and is_causal else attention_mask
    if mask is not None:
        seen = (mask if mask.dtype == torch.bool else mask == 0).expand(rows, 1, *causal.shape)
    sinks = kwargs.get("s_aux")
    if (
        Truth.is_sparse
        and 1 < length == key.shape[2]
        and is_causal
        and torch.equal(seen[:, 0], causal.expand_as(seen[:, 0]))
    ):
        Truth.count += 1
        options = {} if sinks is None else {"sinks": sinks}
        return s2_attention_reference(query, key, value, GROUP, scaling=scaling, **options).contiguous(), None
    if sinks is not None:  # which sdpa has not
        eager = sys.modules[type(module).__module__].eager_attention_forward
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(query.dtype).min)
        return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


AttentionInterface.register(TRUTH, truth_attention)
AttentionMaskInterface.register(TRUTH, sdpa_mask)


def tokens(rows: int, length: int) -> torch.Tensor:
    """(rows, length) token ids of text."""
    return torch.randint(3, TEXT_TOKENS, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids: torch.Tensor, *, training: bool = False, **more: Any) -> torch.Tensor:
    model.train(training)
    torch.manual_seed(0)
    return model(input_ids=ids, use_cache=False, **more).logits


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the size of `b`; infinite if anything is not a number."""
    error = ((a - b).abs().max() / b.std()).item()
    return error if error == error else float("inf")


def documents(ids: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    start = 0
    for length in DOCUMENTS:
        yield slice(start, start + length), ids[:1, start : start + length]
        start += length


def together(model, ids: torch.Tensor, kind: str, *, training: bool) -> torch.Tensor:
    """(1, real tokens, vocabulary): the logits of a packed row, or of the padded row of a batch."""
    if kind == "packed":
        positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
        return logits(model, ids[:1], training=training, position_ids=positions)
    mask = torch.ones_like(ids)
    mask[1, PADDED:] = 0
    return logits(model, ids, training=training, attention_mask=mask)[1:, :PADDED]


def alone(model, ids: torch.Tensor, kind: str) -> torch.Tensor:
    """The same, each document in a row of its own, in plain transformers."""
    if kind == "packed":
        return torch.cat([logits(model, part) for _, part in documents(ids)], 1)
    return logits(model, ids[1:, :PADDED])


def train(model, ids: torch.Tensor, steps: int = 3) -> list[float]:
    """Plain training steps. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextmanager
def embedded(model) -> Iterator[list[torch.Tensor]]:
    """The embeddings of the calls within the block, as leaves that get gradients."""
    found: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        found.append(out.detach().requires_grad_())
        return found[-1] * 1.0  # some models change embeddings in place

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def sees(model, ids: torch.Tensor, asked: slice, **more: Any) -> torch.Tensor:
    """(S,) bool: the tokens that the logits of some tokens depend on, in training."""
    model.train()
    with embedded(model) as found:
        model(input_ids=ids, use_cache=False, **more).logits[:, asked].square().sum().backward()
    model.zero_grad()
    return (found[0].grad != 0).any(-1)[0]


def lost_entries(before: Any, after: Any) -> list[str]:
    """The entries of a RoPE dict that are no scaling and are gone, or others."""
    if not isinstance(before, dict):
        return [] if before == after else [f"{before} became {after}"]
    kept = {k: v for k, v in before.items() if k not in SCALING and k != "rope_theta"}
    if not isinstance(after, dict):
        return [f"{before} became {after}"]
    return [
        entry
        for name, value in kept.items()
        for entry in (
            lost_entries(value, after.get(name))
            if isinstance(value, dict)
            else []
            if after.get(name) == value
            else [f"{name}={value} became {after.get(name)}"]
        )
    ]

"""Attention sinks (gpt_oss): a learned logit for each head, which every softmax counts, and which has no value.

A softmax over more logits is the smaller one times a factor: with the log-sum-exp of the scores, the output times
sigmoid(lse - sink). So any kernel that gives the log-sum-exp can do sinks, and its backward is right if it gets the
output and the log-sum-exp of the whole softmax. Called by `operators` and by sequence's `halo`. `sdpa`, which gives no
log-sum-exp, attends to one more key instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_longlora.kernels.cuts import Boundaries

# Numbers by which `with_sink_key` widens heads: kernels want a multiple of 8.
WIDER = 8
# Tokens that are converted to float32 at a time.
CHUNK = 8192


def add_sinks_(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Count the sinks in a softmax, in place: out (N, H, D_v), lse (H, N), sinks (H,)."""
    logits = sinks.to(lse.dtype)[:, None]
    out.mul_(torch.sigmoid(lse - logits).T.unsqueeze(2))
    torch.logaddexp(lse, logits, out=lse)


@torch.library.custom_op("peft_longlora::sinks_gradient", mutates_args=())
def sinks_gradient(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, layout: torch.Tensor
) -> torch.Tensor:
    """As `gradient_of_sinks`, as an operator; layout: from `Cuts.tensors`, for the padding."""
    return gradient_of_sinks(dout, out, lse, sinks, Boundaries.read(layout).padding)


def gradient_of_sinks(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor,
    padding: Sequence[tuple[int, int]] = (),
) -> torch.Tensor:
    """The gradient of the sinks, (H,).

    Args:
        dout, out: (N, H, D_v). lse: (H, N). Both out and lse count the sinks.
        padding: tokens [from, to) whose gradients do not count.
    """
    grads = torch.empty_like(lse)
    for first in range(0, out.shape[0], CHUNK):
        own = slice(first, first + CHUNK)
        value = (dout[own].to(lse.dtype) * out[own]).sum(2).T
        grads[:, own] = -(sinks.to(lse.dtype)[:, None] - lse[:, own]).exp() * value
    for start, end in padding:
        grads[:, start:end] = 0
    return grads.sum(1).to(sinks.dtype)


@sinks_gradient.register_fake
def _(dout, out, lse, sinks, layout):
    return torch.empty_like(sinks)


def with_sink_key(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values with one more key in front, which every query scores with its head's sink.

    Args:
        query: (n, H, S, D). key: (n, H_kv, T, D). value: (n, H_kv, T, D_v). sinks: (H,). scale: factor on the scores.

    Returns:
        (n, H, S, D + 8), (n, H_kv, T + 1, D + 8) and (n, H_kv, T + 1, D_v); D_v is widened too if it is D. In the wider
        part queries hold sink / scale, and only the new key holds 1.
    """
    pad = torch.nn.functional.pad
    wide = (sinks / scale).to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    query = torch.cat([query, pad(wide, (0, WIDER - 1))], dim=3)
    one = torch.zeros(key.shape[3] + WIDER, dtype=key.dtype, device=key.device)
    one[key.shape[3]] = 1
    same = value.shape[3] == key.shape[3]
    key = torch.cat([one.expand(*key.shape[:2], 1, -1), pad(key, (0, WIDER))], dim=2)
    return query, key, pad(value, (0, WIDER if same else 0, 1, 0))

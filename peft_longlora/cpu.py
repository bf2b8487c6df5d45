"""PyTorch's attention kernel for CPUs under the interface of the flash kernels, with the log-sum-exp that they keep.

For sequence parallelism, which calls a forward and a backward by themselves; a single process on a CPU runs `sdpa`,
which autograd takes apart. Called by `halves`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from peft_longlora.flash import Call, Kernel, Pieces


class CpuAttention(Kernel):
    """PyTorch's flash attention for CPUs, in any floating dtype."""

    name = "cpu"
    install = "it comes with PyTorch"
    takes_batches = True
    has_softcap = False

    def missing(self, device: torch.device) -> str | None:
        """As `Kernel.missing`."""
        return None if device.type == "cpu" else f"it runs on the CPU, and the tensors are on {device.type!r}"

    def lacks(self, call: Call) -> str | None:
        """As `Kernel.lacks`."""
        lacks = {"dropout": call.dropout, "softcap": call.softcap, "attention sinks": call.has_sinks}
        if call.dim != call.value_dim:
            return f"its value heads are as wide as its query heads, not {call.value_dim} and {call.dim}"
        return next((f"it has no {what}" for what, is_wanted in lacks.items() if is_wanted), None)

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        """As `Kernel.forward`."""
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for q_, k_, v_, out_, lse_ in _each(pieces, (q, k, v, out), lse):
            k_, v_ = (x.repeat_interleave(q_.shape[1] // x.shape[1], 1) for x in (k_, v_))
            found = forward(q_, k_, v_, 0.0, pieces.is_causal, scale=scaling)
            out_.copy_(found[0])
            lse_.copy_(found[1])

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        """As `Kernel.backward`."""
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for dout_, q_, k_, v_, out_, *into, lse_ in _each(pieces, (dout, q, k, v, out, dq, dk, dv), lse):
            heads, dtype = k_.shape[1], torch.promote_types(q_.dtype, torch.float32)
            k_, v_ = (x.repeat_interleave(q_.shape[1] // heads, 1) for x in (k_, v_))
            grads = backward(dout_, q_, k_, v_, out_, lse_.to(dtype), 0.0, pieces.is_causal, scale=scaling)
            into[0].copy_(grads[0])
            for to, grad in zip(into[1:], grads[1:], strict=True):
                to.copy_(grad.unflatten(1, (heads, -1)).sum(2))


def _each(pieces: Pieces, tensors: tuple[torch.Tensor, ...], lse: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Views of (pieces, heads, tokens, D), and the sums as (pieces, heads, tokens), of each call to make."""
    if pieces.cu_seqlens is None:
        yield [*(x.transpose(1, 2) for x in tensors), lse]
        return
    for start, end in pairwise(pieces.cu_seqlens.tolist()):
        yield [*(x[start:end].transpose(0, 1)[None] for x in tensors), lse[None, :, start:end]]

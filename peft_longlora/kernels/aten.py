"""The attention kernels that PyTorch ships, with the interface of `kernel`: called as operators, with the log-sum-exp.

FlashAttention-2 with cumulative lengths, cuDNN, and the kernel for CPUs. Only sequence parallelism needs the last one;
a single process on a CPU runs `sdpa`. Called by `operators` and by sequence's `halo`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from peft_longlora.kernels.flash import fa2_cuts, window_sizes
from peft_longlora.kernels.kernel import Kernel, Needs, Pieces, is_deterministic


class TorchVarlen(Kernel):
    """The FlashAttention-2 kernels that PyTorch ships, with cumulative lengths (as in torch.nn.attention.varlen)."""

    name = "varlen"
    has_softcap = False

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        """As `Kernel.forward`."""
        how = dict(scale=scaling, **window_sizes(pieces))
        result = torch.ops.aten._flash_attention_forward(
            q, k, v, *fa2_cuts(pieces), 0.0, pieces.is_causal, False, **how
        )
        out.copy_(result[0])
        lse.copy_(result[1])

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        """As `Kernel.backward`. The operator itself checks PyTorch's deterministic mode."""
        cuts = fa2_cuts(pieces)
        no_dropout = torch.empty(0, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            *cuts,
            0.0,
            pieces.is_causal,
            no_dropout,
            no_dropout,
            scale=scaling,
            **window_sizes(pieces),
        )
        for grad, given in zip((dq, dk, dv), grads, strict=True):
            grad.copy_(given)


class CudnnAttention(Kernel):
    """cuDNN through PyTorch, for batches: on Hopper 1.7 times as fast as the FlashAttention-2 that PyTorch prefers."""

    name = "cudnn"
    takes_pieces = False
    takes_batches = True
    ties_layouts = True
    most_dim = 128
    has_softcap = False
    has_window = False

    def lacks(self, needs: Needs) -> str | None:
        """As `Kernel.lacks`."""
        return "its backward is not deterministic" if is_deterministic() else super().lacks(needs)

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        """As `Kernel.forward`."""
        if pieces.max_length == 1:  # cuDNN refuses it
            each = q.shape[2] // v.shape[2]
            out.copy_(v.repeat_interleave(each, dim=2))
            lse.copy_((q.float() * k.repeat_interleave(each, dim=2)).sum(3).transpose(1, 2) * scaling)
            return
        # (pieces, tokens, heads, D) -> (pieces, heads, tokens, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, pieces.is_causal, False, scale=scaling
        )
        out.copy_(result[0].transpose(1, 2))
        lse.copy_(result[1].view(lse.shape))

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        """As `Kernel.backward`."""
        if pieces.max_length == 1:
            each = q.shape[2] // v.shape[2]
            k, v = (x.repeat_interleave(each, dim=2).float() for x in (k, v))
            # 1, unless out and lse are of a softmax over more keys than this one
            weight = ((q * k).sum(3) * scaling - lse.transpose(1, 2)).exp()
            dscore = weight * (dout * (v - out)).sum(3) * scaling
            dq.copy_(dscore.unsqueeze(3) * k)
            for to, grad in ((dk, dscore.unsqueeze(3) * q), (dv, weight.unsqueeze(3) * dout)):
                to.copy_(grad.unflatten(2, (-1, each)).sum(3))
            return
        # PyTorch keeps cuDNN's backward plans by the dims and strides of q, k and v and by the dropout, and runs a plan
        # that it finds with the strides of out, dout and lse it was made for (ATen/native/cudnn/MHA.cpp). So those must
        # follow from q's: `ties_layouts` sees to out and dout, and lse is made dense. A dropout of -0.0 is none, and
        # keeps these plans apart from those of other callers, because the key is compared by its bytes.
        tensors = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        no_dropout, lengths = torch.zeros((), dtype=torch.int64, device=q.device), (q.shape[1], k.shape[1])
        more = None, None, None, *lengths, -0.0, pieces.is_causal  # no bias and no cumulative lengths
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, lse.contiguous().unsqueeze(-1), no_dropout, no_dropout, *more, scale=scaling
        )
        for grad, given in zip((dq, dk, dv), grads, strict=True):
            grad.copy_(given.transpose(1, 2))


class CpuAttention(Kernel):
    """PyTorch's flash attention for CPUs, in any floating dtype."""

    name = "cpu"
    install = "it comes with PyTorch"
    takes_batches = True
    has_softcap = False

    def missing(self, device: torch.device) -> str | None:
        """As `Kernel.missing`."""
        return None if device.type == "cpu" else f"it runs on the CPU, and the tensors are on {device.type!r}"

    def lacks(self, needs: Needs) -> str | None:
        """As `Kernel.lacks`."""
        lacks = {"dropout": needs.dropout, "softcap": needs.softcap, "sliding window": needs.has_window}
        if needs.dim != needs.value_dim:
            return f"its value heads are as wide as its query heads, not {needs.value_dim} and {needs.dim}"
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

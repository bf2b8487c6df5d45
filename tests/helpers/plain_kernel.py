"""Attention by a formula under the interface of the flash kernels, for machines without a GPU."""

from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from peft_longlora.kernels import backends, operators
from peft_longlora.kernels.kernel import Kernel, Pieces


def forward(q, k, v, scaling, is_causal=True):
    """(1, heads, tokens, D) -> (1, heads, tokens, D_v)."""
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scaling, enable_gqa=True)


def backward(dout, q, k, v, out, scaling, is_causal=True):
    """dq, dk, dv; written out, because operators run below autograd."""
    kv_heads = k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // kv_heads, 1) for x in (k, v))
    scores = q @ k.mT * scaling
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    weights = scores.softmax(-1)
    dscores = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scaling
    grads = dscores @ k, dscores.mT @ q, weights.mT @ dout
    return grads[0], *(x.unflatten(1, (kv_heads, -1)).sum(2) for x in grads[1:])


def cut(cu_seqlens, *tensors):
    """(tokens, heads, D) -> for each piece, the (1, heads, tokens, D) views of all tensors."""
    for start, end in pairwise(cu_seqlens.tolist()):
        yield [x[start:end].transpose(0, 1)[None] for x in tensors]


class PlainKernel(Kernel):
    """Runs anywhere, and whatever is asked for."""

    name = "plain"

    def __init__(self, takes_batches, takes_pieces):
        self.takes_batches, self.takes_pieces = takes_batches, takes_pieces

    def missing(self, device):
        return None

    def lacks(self, needs):
        return None

    def _each(self, pieces, *tensors):
        if pieces.cu_seqlens is not None:
            assert pieces.cu_seqlens.diff().max() == pieces.max_length
            yield from cut(pieces.cu_seqlens, *tensors)
            return
        assert all(x.shape[1] == pieces.max_length for x in tensors)
        for piece in zip(*tensors, strict=True):
            yield [x.transpose(0, 1)[None] for x in piece]

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        lse.fill_(1.0)
        for q_, k_, v_, out_ in self._each(pieces, q, k, v, out):
            out_.copy_(forward(q_, k_, v_, scaling))

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        assert (lse == 1.0).all()
        for *tensors, dq_, dk_, dv_ in self._each(pieces, dout, q, k, v, out, dq, dk, dv):
            for grad, given in zip((dq_, dk_, dv_), backward(*tensors, scaling), strict=True):
                grad.copy_(given)


class FlashAttention4Interface:
    """The two functions of flash_attn.cute.interface that this package calls, and the public one, on a CPU."""

    _kernel = PlainKernel(True, True)

    @staticmethod
    def _pieces(q, causal, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None):
        assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        return Pieces(cu_seqlens_q, q.shape[1] if cu_seqlens_q is None else max_seqlen_q)

    def _flash_attn_fwd(self, q, k, v, *, softmax_scale, causal, out, lse, softcap=None, pack_gqa=None, **cuts):
        assert not softcap
        self._kernel.forward(q, k, v, out, lse, self._pieces(q, causal, **cuts), softmax_scale, 0.0)

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, *, softmax_scale, causal, dq, dk, dv, softcap=0.0, deterministic=False, **cuts
    ):
        assert not softcap
        pieces = self._pieces(q, causal, **cuts)
        self._kernel.backward(dout, q, k, v, out, lse, dq, dk, dv, pieces, softmax_scale, 0.0)

    def flash_attn_varlen_func(self, q, k, v, *, causal, cu_seqlens_q, **cuts):
        self._pieces(q, causal, cu_seqlens_q, **cuts)
        parts = [forward(*part, q.shape[-1] ** -0.5)[0].transpose(0, 1) for part in cut(cu_seqlens_q, q, k, v)]
        return torch.cat(parts)


def install(monkeypatch, kernel: Kernel) -> None:
    """Make a kernel a backend, by its name."""
    monkeypatch.setitem(operators.KERNELS, kernel.name, kernel)
    monkeypatch.setitem(backends.BACKENDS, kernel.name, operators.Launched(kernel))

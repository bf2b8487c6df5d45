"""Both halves of the heads through one kernel: one output, one dq, dk and dv; nothing is copied or concatenated.

The launches of one attention (`launches`) run on streams of falling priority. Each launch fills the multiprocessors
that the launch before leaves idle, and the memory passes around a backward kernel run beside the arithmetic of the next
one. Everything happens inside two PyTorch operators, which autograd, autocast, checkpointing, torch.compile and CUDA
graphs treat as single steps. `Launched` makes a backend from a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Optional

import torch

from peft_longlora.kernels.aten import CpuAttention, CudnnAttention, TorchVarlen
from peft_longlora.kernels.cuts import Boundaries, Cuts
from peft_longlora.kernels.flash import FlashAttention2, FlashAttention3, FlashAttention4
from peft_longlora.kernels.kernel import Backend, Kernel, Needs, Options, Pieces
from peft_longlora.kernels.launches import Launch, plan_launches
from peft_longlora.kernels.sinks import add_sinks_, sinks_gradient

# By name, because an operator cannot take an object as an argument.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        FlashAttention4(),
        FlashAttention3(),
        FlashAttention2(),
        TorchVarlen(),
        CudnnAttention(),
        CpuAttention(),
    )
}


@lru_cache(maxsize=32)
def _side_stream(device: torch.device, index: int, priority: int) -> torch.cuda.Stream:
    """`index` only keeps launches of one priority on streams of their own."""
    return torch.cuda.Stream(device, priority=priority)


def run_launches(launches: Sequence[Launch], call: Callable[[Launch], None], device: torch.device) -> None:
    """Call each launch, the first on the stream of the highest priority and the last on the current stream."""
    if device.type != "cuda" or len(launches) == 1:
        for launch in launches:
            call(launch)
        return
    current = torch.cuda.current_stream(device)
    start = current.record_event()
    used = []
    try:
        for index, launch in enumerate(launches[:-1]):
            stream = _side_stream(device, index, max(index + 1 - len(launches), -3))
            stream.wait_event(start)
            used.append(stream)
            with torch.cuda.stream(stream):
                call(launch)
        call(launches[-1])
    finally:  # after an error too, because no memory may return to its pool while a side stream uses it
        for stream in used:
            current.wait_stream(stream)


def _pieces(launch: Launch, bounds: Boundaries, cu_seqlens: torch.Tensor, window: int) -> Pieces:
    if launch.count:
        return Pieces(None, launch.piece, window=window)
    return Pieces(cu_seqlens[bounds.span(launch.half)], bounds.max_length(launch.half), window=window)


def _launches(bounds: Boundaries, q: torch.Tensor, k: torch.Tensor, kernel: Kernel) -> tuple[Launch, ...]:
    dim = q.shape[2]
    return plan_launches(bounds, q.shape[1], k.shape[1], dim, kernel.takes_batches, kernel.takes_pieces)


def _clear(bounds: Boundaries, *tensors: torch.Tensor) -> None:
    """Write zeros at padding. Kernels attend there (only to padding), or leave it unwritten."""
    for start, end in bounds.padding:
        for x in tensors:
            x[start:end].zero_()


def empty_gradients(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Room for the gradients of tensors: of the same shapes, and dense, whatever the layout of those is."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


@torch.library.custom_op("peft_longlora::attend_halves", mutates_args=())
def attend_halves(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scaling: float,
    softcap: float,
    backend: str,
    window: int = 0,
    sinks: Optional[torch.Tensor] = None,  # noqa: UP045 (torch 2.11 reads no `|` here)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside the pieces of each half.

    Args:
        q: (N, H, D). k: (N, H_kv, D). v: (N, H_kv, D_v). N counts the B * S flattened tokens.
        layout, cu_seqlens: from `Cuts.tensors`.
        scaling: factor on the scores. softcap: 0 for no softcap.
        backend: a name in `KERNELS`; the caller has checked that this kernel can run the call.
        window: keys that a query sees, itself included; 0 for all of its piece. sinks: (H,), counted in every softmax.

    Returns: (N, H, D_v), 0 at padding, and the log-sum-exp of the scores, (H, N) float32.
    """
    kernel, bounds = KERNELS[backend], Boundaries.read(layout)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)

    def call(x: Launch) -> None:
        kv = x.kv_heads
        tensors = x.tokens(q, x.heads), x.tokens(k, kv), x.tokens(v, kv), x.tokens(out, x.heads), x.sums(lse)
        kernel.forward(*tensors, _pieces(x, bounds, cu_seqlens, window), scaling, softcap)

    run_launches(_launches(bounds, q, k, kernel), call, q.device)
    if sinks is not None:
        add_sinks_(out, lse, sinks)
    _clear(bounds, out)
    return out, lse


@attend_halves.register_fake
def _(q, k, v, layout, cu_seqlens, scaling, softcap, backend, window=0, sinks=None):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("peft_longlora::attend_halves_backward", mutates_args=())
def attend_halves_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scaling: float,
    softcap: float,
    backend: str,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v. They are 0 at padding, whatever the gradient of the output is there."""
    kernel, bounds = KERNELS[backend], Boundaries.read(layout)
    launches = _launches(bounds, q, k, kernel)
    if dout.stride(-1) != 1 or 0 in dout.stride():  # the gradient of a sum is one number with strides of 0
        dout = dout.contiguous()
    if kernel.ties_layouts:  # out is dense
        q, dout = q.contiguous(), dout.contiguous()
    dq, dk, dv = empty_gradients(q, k, v)
    grads = dict.fromkeys(("straight", "shifted"), (dk, dv))
    if bounds.is_split and k.shape[1] == 1 and q.shape[1] > 1:  # both halves read the single KV head
        grads["shifted"] = torch.empty_like(dk), torch.empty_like(dv)

    def call(x: Launch) -> None:
        kv, (to_k, to_v) = x.kv_heads, grads[x.half]
        kernel.backward(
            x.tokens(dout, x.heads),
            x.tokens(q, x.heads),
            x.tokens(k, kv),
            x.tokens(v, kv),
            x.tokens(out, x.heads),
            x.sums(lse),
            x.tokens(dq, x.heads),
            x.tokens(to_k, kv),
            x.tokens(to_v, kv),
            _pieces(x, bounds, cu_seqlens, window),
            scaling,
            softcap,
        )

    run_launches(launches, call, q.device)
    if grads["shifted"][0] is not dk:
        for total, part in zip((dk, dv), grads["shifted"], strict=True):
            total += part
    _clear(bounds, dq, dk, dv)
    return dq, dk, dv


@attend_halves_backward.register_fake
def _(dout, q, k, v, out, lse, layout, cu_seqlens, scaling, softcap, backend, window=0):
    return empty_gradients(q, k, v)


def _save(ctx, inputs, output):
    q, k, v, layout, cu_seqlens, *ctx.how, sinks = inputs
    ctx.save_for_backward(q, k, v, *output, layout, cu_seqlens, sinks)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    if dout is None:
        return (None,) * 10  # one for each argument of `attend_halves`
    *tensors, sinks = ctx.saved_tensors
    grads = attend_halves_backward(dout, *tensors, *ctx.how)
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[-1]:
        _, _, _, out, lse, layout, _ = tensors
        dsinks = sinks_gradient(dout, out, lse, sinks, layout)
    return *grads, None, None, None, None, None, None, dsinks


attend_halves.register_autograd(_backward, setup_context=_save)


class Launched(Backend):
    """A kernel as a backend; the operators run both halves of the heads."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.name, self.install = kernel, kernel.name, kernel.install

    def missing(self, device: torch.device) -> str | None:
        """As `Kernel.missing`."""
        return self.kernel.missing(device)

    def lacks(self, needs: Needs) -> str | None:
        """As `Kernel.lacks`."""
        if needs.blocks:
            return "it attends inside groups, not to blocks of keys"
        return self.kernel.lacks(needs)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cuts: Cuts, options: Options
    ) -> torch.Tensor:
        """As `Backend.attend`."""
        batch, heads, length, dim = query.shape
        # (B, H, S, D) -> (B * S, H, D); a view, because projections give (B, S, H, D)
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        how = options.scale(dim), options.softcap or 0.0, self.name, cuts.window, options.sinks
        out, _ = attend_halves(q, k, v, *cuts.tensors(query.device), *how)
        return out.view(batch, length, heads, value.shape[3])

"""S2-Attn of a sequence that several ranks share: the exchange of the halo, and the kernels around it.

Each rank holds a stretch of the sequence. The kernels of `operators` attend to the keys and values of this stretch.
Only a group that began before the rank's first token needs more: the keys and values of its earlier tokens, the halo.
The halo is at most a group for one half of the heads and half a group for the other, however long the sequence is and
however many ranks there are. One all-to-all brings it while the kernels run. Then the rank's queries of that group
attend to the halo too, and the two parts of each softmax are merged. Another all-to-all returns the gradients of the
halo. Called by `layer`, with a plan of `edges`.

A rank waits for earlier ranks in the forward and for later ranks in the backward, never for both. Waiting both ways in
every layer would make each rank pay for the others' slow moments (GPUs at their power limit differ by a few percent
from moment to moment). Gradient checkpointing would add such waits, so a forward keeps what it received, and
recomputation exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from peft_longlora.kernels.attend import DEFAULTS, checked
from peft_longlora.kernels.backends import pick_kernel
from peft_longlora.kernels.cuts import Boundaries, regular_groups, tensors_of
from peft_longlora.kernels.kernel import Kernel, Options, Pieces
from peft_longlora.kernels.launches import head_halves
from peft_longlora.kernels.operators import KERNELS, attend_halves, attend_halves_backward, empty_gradients
from peft_longlora.kernels.sinks import add_sinks_, gradient_of_sinks
from peft_longlora.sequence.edges import Halo, Ranges

# Keys and values of the straight and of the shifted half of the heads.
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Kept:
    """What the forward of one layer received from other ranks, kept for recomputation. Empty until the forward fills
    it.

    With half a group on each side of the border it holds (G/2) (H_kv + H/2) D numbers, whatever the sequence's length.

    Attributes:
        far: keys and values of the halo, (T, h_kv, D) and (T, h_kv, D_v) for each half.
        rows: output (s, h, D_v) and log-sum-exp (h, s) of the queries that attend to the halo, for each half with any.
    """

    far: Pairs = field(default_factory=list)
    rows: Pairs = field(default_factory=list)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    halo: Halo,
    options: Options = DEFAULTS,
    kept: Kept | None = None,
) -> torch.Tensor:
    """S2-Attn of this rank's stretch of a shared sequence: (1, H, S, D), (1, H_kv, S, D) -> (1, S, H, D_v).

    Every rank of the group must call it, and its backward, in the same order.

    Args:
        kept: an empty object is filled. If the same layer filled it in the same forward, it is used and nothing is
            exchanged; this must be the same on all ranks.

    Raises:
        ValueError: tensors that do not fit together, or a backend that is unknown or not available.
        NotImplementedError: no backend whose forward and backward can be called separately can run this call.
    """
    query, key, value = checked(query, key, value, options)
    name = pick_kernel(query, key, value, halo.groups.is_regular, options)
    # (1, H, S, D) -> (S, H, D); a view, because projections give (1, S, H, D)
    tensors = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    how = options.scale(query.shape[3]), options.softcap or 0.0, name
    return _Attend.apply(*tensors, options.sinks, halo, Kept() if kept is None else kept, *how)[None]


class _Attend(torch.autograd.Function):
    """The kernels' forward and backward, and the exchanges, in an order in which they overlap."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, halo: Halo, kept: Kept, scaling: float, softcap: float, name: str) -> torch.Tensor:
        """(S, H, D), (S, H_kv, D), (S, H_kv, D_v) and (H,) or None -> (S, H, D_v)."""
        ctx.halo, ctx.how = halo, (scaling, softcap, name)
        is_first = not kept.far
        travelling = _start(halo, halo.sends, halo.receives, _by_half(q, k, v)) if is_first else None
        out, lse = attend_halves(q, k, v, *tensors_of(halo.groups, q.device), *ctx.how)
        # Rows at borders are written in place, the same each time, so a checkpointed block may keep `out` and `lse`.
        # torch refuses kept tensors that were changed; it is not told, because `data` has a version of its own.
        borders = _borders(halo, q, k)
        rows = [(half, q[own, heads], out.data[own, heads], lse.data[heads, own]) for half, own, heads in borders]
        if is_first:
            kept.far = _room(_by_half(q, k, v), halo.needs)
            _add(halo.receives, kept.far, travelling)
            for half, near_q, near_out, near_lse in rows:
                merge(near_out, near_lse, *attend_far(near_q, *kept.far[half], *ctx.how))
                kept.rows.append((near_out.clone(), near_lse.clone()))
        else:
            for (_, _, near_out, near_lse), (kept_out, kept_lse) in zip(rows, kept.rows, strict=True):
                near_out.copy_(kept_out)
                near_lse.copy_(kept_lse)
        if sinks is not None:
            add_sinks_(out, lse, sinks)
            for start, end in Boundaries.of(halo.groups).padding:
                out[start:end].zero_()
        ctx.save_for_backward(q, k, v, out, lse, sinks, *(x for pair in kept.far for x in pair))
        return out

    @staticmethod
    def backward(ctx, dout: torch.Tensor):
        """The far keys and values come first: their gradients travel while the rest is computed."""
        halo = ctx.halo
        q, k, v, out, lse, sinks, k_straight, v_straight, k_shifted, v_shifted = ctx.saved_tensors
        far = [(k_straight, v_straight), (k_shifted, v_shifted)]
        q, dout = q.contiguous(), dout.contiguous()  # so that slices of them and of out have one layout
        gradients, near = list(far), []
        for half, own, heads in _borders(halo, q, k):
            one = dout[own, heads], q[own, heads], *far[half], out[own, heads], lse[heads, own]
            dq_far, *gradients[half] = attend_far_backward(*one, *ctx.how)
            near.append((own, heads, dq_far))
        travelling = _start(halo, halo.receives, halo.sends, gradients)
        dq, dk, dv = attend_halves_backward(dout, q, k, v, out, lse, *tensors_of(halo.groups, q.device), *ctx.how)
        for own, heads, dq_far in near:
            dq[own, heads] += dq_far
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            dsinks = gradient_of_sinks(dout, out, lse, sinks, Boundaries.of(halo.groups).padding)
        _add(halo.sends, _by_half(q, dk, dv), travelling)
        return dq, dk, dv, dsinks, None, None, None, None, None


def _borders(halo: Halo, q: torch.Tensor, k: torch.Tensor) -> list[tuple[int, slice, slice]]:
    """For each group that began on an earlier rank: its half, its tokens on this rank, and its query heads."""
    heads, _ = head_halves(q.shape[1], k.shape[1])
    return [
        (half, slice(halo.owns[half]), slice(*heads[half]))
        for half in (0, 1)
        if halo.needs[half] and heads[half][0] < heads[half][1]
    ]


def merge(out: torch.Tensor, lse: torch.Tensor, far_out: torch.Tensor, far_lse: torch.Tensor) -> None:
    """Merge two softmaxes over different keys into the first one, in place; computed in float32.

    Args:
        out, far_out: (S, H, D_v). lse, far_lse: (H, S), the log-sum-exp of the scores of each part.

    Source: ring attention, arXiv:2310.01889; a flash kernel merges its parts in the same way.
    """
    far = torch.sigmoid(far_lse - lse).T.unsqueeze(2)  # the weight of the far keys
    torch.addcmul(out * (1 - far), far_out, far, out=out)
    torch.logaddexp(lse, far_lse, out=lse)


def attend_far(q, k, v, scaling: float, softcap: float, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query attends to every key: (S, H, D), (T, H_kv, D), (T, H_kv, D_v) -> (S, H, D_v) and (H, S) sums.

    Args: as `operators.attend_halves`, for one half.
    """
    kernel, as_taken, pieces = _one_call(q, k, backend)
    out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    kernel.forward(*map(as_taken, (q, k, v, out, lse)), pieces, scaling, softcap)
    return out, lse


def attend_far_backward(dout, q, k, v, out, lse, scaling: float, softcap: float, backend: str) -> list[torch.Tensor]:
    """The contribution of these keys to dq, and their dk and dv.

    Args:
        out, lse: of the whole softmax, over other keys too. others: as `operators.attend_halves_backward`.
    """
    kernel, as_taken, pieces = _one_call(q, k, backend)
    grads = list(empty_gradients(q, k, v))
    tensors = dout, q, k, v, out, lse.contiguous(), *grads
    kernel.backward(*map(as_taken, tensors), pieces, scaling, softcap)
    return grads


def _one_call(q: torch.Tensor, k: torch.Tensor, backend: str) -> tuple[Kernel, Callable, Pieces]:
    """The kernel, a function that brings tensors into its form, and one piece of queries with one of far keys."""
    if backend == "cudnn" and 1 in (len(q), len(k)):  # which it refuses
        backend = "varlen"
    kernel = KERNELS[backend]
    if kernel.takes_batches:
        return kernel, lambda x: x[None], Pieces(None, len(q), Pieces(None, len(k)))
    queries, keys = (Pieces(tensors_of(regular_groups(1, len(x), 2, "full"), x.device)[1][:2], len(x)) for x in (q, k))
    return kernel, lambda x: x, replace(queries, far=keys)


def _room(halves: Pairs, needs: Sequence[int]) -> Pairs:
    return [tuple(x.new_zeros(n, *x.shape[1:]) for x in pair) for pair, n in zip(halves, needs, strict=True)]


def bring(plan: Exchange, own: Pairs, needs: Sequence[int]) -> Pairs:
    """The keys and values of earlier ranks, `needs` tokens for each pair; `own`: those of this rank."""
    far = _room(own, needs)
    _add(plan.receives, far, _start(plan, plan.sends, plan.receives, own))
    return far


def send_back(plan: Exchange, far: Pairs, own: Pairs) -> None:
    """Return the gradients of what `bring` brought, and add those of other ranks to `own`."""
    _add(plan.sends, own, _start(plan, plan.receives, plan.sends, far))


def _by_half(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Pairs:
    """Keys and values of the straight and of the shifted half; views."""
    _, kv_heads = head_halves(q.shape[1], k.shape[1])
    return [(k[:, first:last], v[:, first:last]) for first, last in kv_heads]


class Exchange(Protocol):
    """Who sends what to whom: `edges.Halo`, or `window.Window`."""

    sends: Ranges
    receives: Ranges
    is_needed: bool
    group: dist.ProcessGroup | None


class _Travelling(NamedTuple):
    """An all-to-all in progress, and the buffer that it fills."""

    buffer: torch.Tensor
    work: dist.Work


def _views(ranges: Ranges, halves: Pairs) -> list[torch.Tensor]:
    """The parts to send to, or receive from, each rank: keys and values of the straight half, then of the shifted
    half."""
    return [
        x[first:last]
        for of_rank in ranges
        for (first, last), pair in zip(of_rank, halves, strict=True)
        if first < last
        for x in pair
    ]


def _start(halo: Exchange, sends: Ranges, receives: Ranges, halves: Pairs) -> _Travelling | None:
    """Start an all-to-all, or nothing if no rank needs anything."""
    if not halo.is_needed:
        return None
    widths = [sum(x.shape[1] * x.shape[2] for x in pair) for pair in halves]

    def sizes(ranges: Ranges) -> list[int]:
        return [sum((last - first) * w for (first, last), w in zip(one, widths, strict=True)) for one in ranges]

    nothing = halves[0][0].new_empty(0)
    packed = torch.cat([nothing, *(x.flatten() for x in _views(sends, halves))])
    buffer = nothing.new_empty(sum(sizes(receives)))
    work = dist.all_to_all_single(buffer, packed, sizes(receives), sizes(sends), group=halo.group, async_op=True)
    return _Travelling(buffer, work)


def _add(ranges: Ranges, halves: Pairs, travelling: _Travelling | None) -> None:
    """Add the received parts to `halves`. A rank that receives nothing waits for nobody, and may run ahead."""
    if travelling is None or not travelling.buffer.numel():
        return
    travelling.work.wait()
    parts = _views(ranges, halves)
    for to, came in zip(parts, travelling.buffer.split([x.numel() for x in parts]), strict=True):
        to += came.view(to.shape)

"""S2-Attn of a sequence that several ranks share: the exchange of the halo, and the kernels around it.

Each rank holds a stretch of the sequence, and attends by the kernels of `halves` to the groups that begin in it. Only
the group that began before its first token needs more: the keys and values of that group's earlier tokens, its halo,
at most a group of one half of the heads and half a group of the other, however long the sequence and however many the
ranks. They come in one all-to-all while the other groups are attended to; their gradients go back in another.
Called by `shared`, with a plan of `neighbours`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed._functional_collectives import wait_tensor

from peft_longlora import kernels
from peft_longlora.backends import check_backend, pick_kernel
from peft_longlora.halves import attend_halves, attend_halves_backward, regular_groups
from peft_longlora.launches import head_halves
from peft_longlora.neighbours import Halo, Ranges


def attend_shared(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    halo: Halo,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """S2-Attn of this rank's stretch of a shared sequence: (1, H, S, D), (1, H_kv, S, D) -> (1, S, H, D_v).

    Every rank of the group must call it, and its backward, in the same order.

    Args: as `kernels.attend`.

    Raises:
        ValueError: tensors that do not fit together, or a backend that is unknown or not available.
        NotImplementedError: no backend that takes a forward and a backward apart can run this call.
    """
    check_backend(backend)
    kernels.check_dropout(dropout)
    kernels.check_tensors(query, key, value)
    query, key, value = kernels.cast(query, key, value)
    softcap = softcap or 0.0
    name = pick_kernel(query, key, value, halo.groups.is_regular, dropout, backend, softcap, sinks is not None)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    # (1, H, S, D) -> (S, H, D); a view of what a projection gives
    tensors = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return _AttendShared.apply(*tensors, halo, scaling, softcap, name)[None]


Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class _AttendShared(torch.autograd.Function):
    """The kernels' forward and backward, and the exchanges, in the order in which they overlap."""

    @staticmethod
    def forward(ctx, q, k, v, halo: Halo, scaling: float, softcap: float, name: str) -> torch.Tensor:
        """(S, H, D), (S, H_kv, D), (S, H_kv, D_v) -> (S, H, D_v)."""
        ctx.halo, ctx.how = halo, (scaling, softcap, name)
        travelling = _start(halo, halo.sends, halo.receives, _by_half(q, k, v))
        out, lse = attend_halves(q, k, v, *halo.groups.tensors(q.device), *ctx.how)
        received = _receive(halo, travelling, _by_half(q, k, v))
        sums = []
        for half, one in _first_groups(halo, q, k, v, received):
            first_out, first_lse = attend_halves(*one.tensors, *one.plan, *ctx.how)
            out[: halo.owns[half], one.heads] = first_out[halo.needs[half] :]
            sums.append(first_lse)
        ctx.save_for_backward(q, k, v, out, lse, *(x for pair in received for x in pair), *sums)
        return out

    @staticmethod
    def backward(ctx, dout: torch.Tensor):
        """The first groups first: the gradients of their halo travel while the rest is computed."""
        halo = ctx.halo
        q, k, v, out, lse, k_straight, v_straight, k_shifted, v_shifted, *sums = ctx.saved_tensors
        received = [(k_straight, v_straight), (k_shifted, v_shifted)]
        gradients = [tuple(torch.zeros_like(x) for x in pair) for pair in received]
        own = []
        for (half, one), first_lse in zip(_first_groups(halo, q, k, v, received), sums, strict=True):
            needs = halo.needs[half]
            # The output of the queries that are not ours has no gradient, so it may be anything.
            first = (_extend(x[: halo.owns[half], one.heads], needs) for x in (dout, out))
            grads = attend_halves_backward(next(first), *one.tensors, next(first), first_lse, *one.plan, *ctx.how)
            gradients[half] = grads[1][:needs], grads[2][:needs]
            own.append((halo.owns[half], one.heads, one.kv_heads, [x[needs:] for x in grads]))
        travelling = _start(halo, halo.receives, halo.sends, gradients)
        dq, dk, dv = attend_halves_backward(dout, q, k, v, out, lse, *halo.groups.tensors(q.device), *ctx.how)
        for tokens, heads, kv_heads, grads in own:
            for x, which, grad in zip((dq, dk, dv), (heads, kv_heads, kv_heads), grads, strict=True):
                x[:tokens, which] += grad
        if travelling is not None:
            _add(halo.sends, _by_half(q, dk, dv), wait_tensor(travelling))
        return dq, dk, dv, None, None, None, None


class _FirstGroup(NamedTuple):
    """The group of one half that began on an earlier rank, as an ordinary causal one."""

    heads: slice
    kv_heads: slice
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    plan: tuple[torch.Tensor, torch.Tensor]


def _first_groups(halo: Halo, q, k, v, received: Pairs) -> list[tuple[int, _FirstGroup]]:
    """The halo's tokens in front of our own. Their queries are elsewhere: zeros stand for them, and cost at most 1/8
    of a group's square, once a rank.
    """
    found = []
    for half, (heads, kv_heads) in enumerate(zip(*head_halves(q.shape[1], k.shape[1]), strict=True)):
        needs, owns = halo.needs[half], halo.owns[half]
        if needs and heads[0] < heads[1]:
            heads, kv_heads = slice(*heads), slice(*kv_heads)
            query = _extend(q[:owns, heads], needs)
            keys, values = (torch.cat((far, x[:owns, kv_heads])) for far, x in zip(received[half], (k, v), strict=True))
            plan = regular_groups(1, needs + owns, 2, "full").tensors(q.device)
            found.append((half, _FirstGroup(heads, kv_heads, (query, keys, values), plan)))
    return found


def _extend(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """(S, H, D) -> (tokens + S, H, D), zeros in front."""
    return torch.cat((x.new_zeros(tokens, *x.shape[1:]), x))


def _by_half(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Pairs:
    """Keys and values of the straight and of the shifted half; views."""
    _, kv_heads = head_halves(q.shape[1], k.shape[1])
    return [(k[:, first:last], v[:, first:last]) for first, last in kv_heads]


def _views(ranges: Ranges, halves: Pairs) -> list[list[torch.Tensor]]:
    """What goes to, or comes from, each rank: keys and values of the straight half, then of the shifted one."""
    return [
        [x[first:last] for (first, last), pair in zip(of_rank, halves, strict=True) for x in pair] for of_rank in ranges
    ]


def _start(halo: Halo, sends: Ranges, receives: Ranges, halves: Pairs) -> torch.Tensor | None:
    """Start an all-to-all. Returns what will be received, to be waited for, or None if no rank needs anything."""
    if not halo.is_needed:
        return None
    parts = _views(sends, halves)
    buffer = torch.cat([x.flatten() for of_rank in parts for x in of_rank])
    widths = [sum(x.shape[1] * x.shape[2] for x in pair) for pair in halves]

    def sizes(ranges: Ranges) -> list[int]:
        return [sum((last - first) * w for (first, last), w in zip(one, widths, strict=True)) for one in ranges]

    # Not through the wrapper, whose tensors wait at the first touch: here it is said where to wait.
    return torch.ops._c10d_functional.all_to_all_single(buffer, sizes(receives), sizes(sends), halo.group.group_name)


def _receive(halo: Halo, travelling: torch.Tensor | None, halves: Pairs) -> Pairs:
    """The keys and values of the halo, (tokens, heads, D), of both halves."""
    received = [
        tuple(x.new_zeros(needs, *x.shape[1:]) for x in pair) for needs, pair in zip(halo.needs, halves, strict=True)
    ]
    if travelling is not None:
        _add(halo.receives, received, wait_tensor(travelling))
    return received


def _add(ranges: Ranges, halves: Pairs, buffer: torch.Tensor) -> None:
    """Add what came to where it belongs."""
    parts = [x for of_rank in _views(ranges, halves) for x in of_rank]
    for to, came in zip(parts, buffer.split([x.numel() for x in parts]), strict=True):
        to += came.view(to.shape)

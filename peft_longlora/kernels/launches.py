"""Which kernel calls make up one attention: host-side arithmetic. Called by `operators` and by sequence's `halo`.

Pieces of one length at equal distances form a batch of views. FlashAttention-4 runs such a batch 5% faster than the
same pieces with cumulative lengths (docs/attention.md has the numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from peft_longlora.kernels.cuts import Boundaries
from peft_longlora.kernels.groups import split_heads

# A half with more batches than this is given as cumulative lengths, if the kernel accepts them.
MOST_BATCHES = 3
# Below this number of scores x heads x head dim, a call takes longer to launch than to run: one call a half is best.
LEAST_BATCHED_WORK = 2**38


@dataclass(frozen=True)
class Launch:
    """One kernel call: some heads of one half, on all pieces, or on `count` pieces of one length `stride` apart."""

    half: str
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    start: int = 0
    piece: int = 0
    count: int = 0
    stride: int = 0

    def tokens(self, x: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
        """(N, H, D) -> (N, h, D), or (count, piece, h, D); a view."""
        first, last = heads
        if not self.count:
            return x[:, first:last]
        token, head, one = x.stride()
        start = x.storage_offset() + self.start * token + first * head
        size = self.count, self.piece, last - first, x.shape[2]
        return x.as_strided(size, (self.stride * token, token, head, one), start)

    def sums(self, lse: torch.Tensor) -> torch.Tensor:
        """(H, N) -> (h, N), or (count, h, piece); a view."""
        first, last = self.heads
        if not self.count:
            return lse[first:last]
        head, one = lse.stride()
        start = lse.storage_offset() + self.start + first * head
        return lse.as_strided((self.count, last - first, self.piece), (self.stride, head, one), start)


def head_halves(heads: int, kv_heads: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The query heads of the straight and the shifted half, and the KV heads that each reads, as (from, to)."""
    h, h_kv = split_heads(heads, kv_heads)
    # A single KV head is read by both halves.
    return [(0, h), (h, heads)], [(0, h_kv or min(h, 1)), (h_kv, kv_heads)]


def halves_of(bounds: Boundaries, heads: int, kv_heads: int) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
    """The halves to compute, as (name, query heads [from, to), KV heads [from, to))."""
    if not bounds.is_split:
        return [("straight", (0, heads), (0, kv_heads))]
    return list(zip(("straight", "shifted"), *head_halves(heads, kv_heads), strict=True))


def find_batches(boundaries: Sequence[int], padding: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int, int, int]]:
    """Pieces of one length at equal distances as (start, piece length, count, distance), in tokens; largest first.

    Example: (0, 2, 6, 10, 12) -> [(2, 4, 2, 4), (0, 2, 2, 10)]: the two short ends are one batch.
    """
    starts: dict[int, list[int]] = {}
    for start, end in pairwise(boundaries):
        if end > start and not any(first <= start < last for first, last in padding):
            starts.setdefault(end - start, []).append(start)
    batches = []
    for piece, at in starts.items():
        first = 0
        while first < len(at):
            last = first + 1
            while last < len(at) and at[last] - at[last - 1] == at[first + 1] - at[first]:
                last += 1
            stride = at[first + 1] - at[first] if last > first + 1 else piece
            batches.append((at[first], piece, last - first, stride))
            first = last
    return sorted(batches, key=lambda b: -b[1] * b[1] * b[2])


@lru_cache(maxsize=64)
def plan_launches(
    bounds: Boundaries, heads: int, kv_heads: int, dim: int, takes_batches: bool, takes_pieces: bool
) -> tuple[Launch, ...]:
    """The kernel calls of one attention, the largest first.

    Args:
        bounds: the boundaries of both halves.
        heads, kv_heads, dim: H, H_kv and D.
        takes_batches, takes_pieces: see `kernel.Kernel`.
    """
    launches: list[Launch] = []
    for half, q, kv in halves_of(bounds, heads, kv_heads):
        if q[0] == q[1] or len(getattr(bounds, half)) < 2:
            continue
        batches = find_batches(getattr(bounds, half), bounds.padding) if takes_batches else []
        work = sum(piece * piece * count for _, piece, count, _ in batches) * (q[1] - q[0]) * dim
        is_worth = len(batches) == 1 or (1 < len(batches) <= MOST_BATCHES and work >= LEAST_BATCHED_WORK)
        if takes_pieces and (bounds.padding or not is_worth):
            launches.append(Launch(half, q, kv))
        else:
            launches.extend(Launch(half, q, kv, *batch) for batch in batches)
    return tuple(sorted(launches, key=lambda x: -x.piece * x.piece * x.count))

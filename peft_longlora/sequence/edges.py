"""Computes what ranks that share a sequence must send to each other, on the host.

A rank attends to the keys and values of its stretch. If a group began on an earlier rank, it also needs that group's
earlier keys and values, its halo. One small all-gather in each forward gives every rank the numbers to compute who
sends what to whom. The time does not depend on the length of the sequence. Called by `layer`; read by `halo`,
`window` and `ulysses`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist

from peft_longlora.kernels.groups import Groups, plan_groups, tokens_before
from peft_longlora.kernels.patterns import PATTERNS, shift_of

# For each rank and half of the heads (or for all heads at once): tokens [from, to).
Ranges = tuple[tuple[tuple[int, int], ...], ...]
Documents = list[tuple[int, int, int]]


class Edges(NamedTuple):
    """The numbers of a rank's stretch that all ranks must know. Every rank has the edges of all ranks, in order.

    Attributes:
        length: tokens. head, tail: tokens of its first and its last document, 0 for padding.
        first, last: positions of the first and of the last token that is not padding.
        group_size, pattern: G, and the pattern's place among `patterns.PATTERNS`: the same on all ranks.
        has_hole: whether there is padding inside a document, 0 or 1.
        front, behind: tokens of padding before the first and after the last document; the length if there is no other.
        opens, after: positions of the stretch's first token, and of the first token of the padding `behind`.
    """

    length: int
    head: int
    tail: int
    first: int
    last: int
    group_size: int
    pattern: int
    has_hole: int = 0
    front: int = 0
    behind: int = 0
    opens: int = 0
    after: int = 0


def exchange_edges(
    documents: Documents, position_ids: torch.Tensor, group_size: int, pattern: str, group: dist.ProcessGroup
) -> list[Edges]:
    """The edges of all ranks, from one all-gather of twelve numbers a rank in each forward.

    Args:
        documents: those of this rank's stretch, from `groups.find_documents`.
        position_ids: (1, S), counted in the whole sequence or from the start of each document.

    Raises:
        ValueError, on all ranks: the stretches do not form one sequence, or ranks attend in different ways.
    """
    length = position_ids.shape[1]
    (_, head, number), (_, tail, last_number) = (documents[0], documents[-1]) if length else ((0, 0, 0),) * 2
    real = [one for one in documents if one[2]]
    has_hole = int(len({one[2] for one in real}) < len(real))
    ends = head * bool(number), tail * bool(last_number)
    front, behind = (length, length) if not real else (real[0][0], length - real[-1][0] - real[-1][1])
    mine = Edges(length, *ends, 0, 0, group_size, PATTERNS.index(pattern), has_hole, front, behind)
    mine = torch.tensor(mine).to(position_ids.device)
    if length:
        places = (front, length - behind - 1, 0, length - behind) if real else (0,) * 4
        found = position_ids[0, [min(place, length - 1) for place in places]]
        mine[3:5], mine[10:] = found[:2], found[2:]
    edges = [Edges(*one) for one in torch.stack(gather(mine, group)).tolist()]
    _check_edges(edges)
    return edges


def gather(x: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Gather a tensor from all ranks, in their order."""
    gathered = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(gathered, x, group)
    return gathered


def _check_edges(edges: list[Edges]) -> None:
    if not all(edge.length for edge in edges):
        raise ValueError(
            f"The ranks hold stretches of {[edge.length for edge in edges]} tokens, and each needs one or more. Cut "
            f"the batch with shard_batch, which pads."
        )
    if holes := _holes(edges):
        raise ValueError(
            f"attention_mask has padding inside a document (0 between two 1, {holes[0]}), which ranks that share a "
            f"sequence cannot leave out. Mask padding only at the ends of rows: give the tokenizer its own pad token. "
            f"To end a document there, give position_ids that restart."
        )
    if len({(edge.group_size, edge.pattern) for edge in edges}) > 1:
        raise ValueError(
            f"The ranks that share a sequence attend in different ways, (group_size, pattern) = "
            f"{[(edge.group_size, PATTERNS[edge.pattern]) for edge in edges]}. Configure all of them alike."
        )
    for rank in range(1, len(edges)):
        last, first = edges[rank - 1].last, edges[rank].first
        if edges[rank - 1].tail and edges[rank].head and first not in (0, last + 1):
            raise ValueError(
                f"The ranks do not hold one sequence: rank {rank - 1} ends at position {last}, and rank {rank} begins "
                f"at {first}, which neither continues the document nor starts one at 0 (stretches of "
                f"{[edge.length for edge in edges]} tokens). Give every rank of the group the same batch, and cut it "
                f"with shard_batch."
            )


def _holes(edges: list[Edges]) -> list[str]:
    """Where padding stands inside a document: on a rank, or between the tokens of two ranks.

    No rank sees that its document goes on behind padding at its end. The rule is that of attention's `mask` for a row:
    a document goes on if its positions do, which count padding or leave it out.
    """
    found = [f"on rank {rank}" for rank, edge in enumerate(edges) if edge.has_hole]
    real = [rank for rank, edge in enumerate(edges) if edge.front < edge.length]
    for left, right in pairwise(real):
        before, here = edges[left], edges[right]
        padding = before.behind + sum(edge.length for edge in edges[left + 1 : right]) + here.front
        after = before.after if before.behind else edges[left + 1].opens
        step = padding + 1 if after == before.last + 1 else 1
        if padding and here.first == before.last + step:
            found.append(f"between the tokens of ranks {left} and {right}")
    return found


def is_continued(edges: list[Edges], rank: int) -> bool:
    """Whether a rank's first token belongs to the document that the rank before ends with."""
    before, here = edges[rank - 1], edges[rank]
    return bool(rank and before.tail and here.head and here.first == before.last + 1)


def tokens_elsewhere(edges: list[Edges]) -> tuple[list[int], list[int]]:
    """For each rank, tokens of its first document on earlier ranks, and of its last one on later ranks."""
    before, after = [0] * len(edges), [0] * len(edges)
    for rank in range(1, len(edges)):
        if is_continued(edges, rank):
            one = edges[rank - 1]
            before[rank] = one.tail + (before[rank - 1] if one.tail == one.length else 0)
    for rank in reversed(range(len(edges) - 1)):
        if is_continued(edges, rank + 1):
            one = edges[rank + 1]
            after[rank] = one.head + (after[rank + 1] if one.head == one.length else 0)
    return before, after


def plan_exchange(
    starts: list[int], needs: list[int], rank: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What a rank sends to each rank, and what it receives from each: tokens [from, to).

    Args:
        starts: where each rank's stretch starts in the sequence, and where the last one ends.
        needs: for each rank, how many tokens it needs of those just before its stretch.

    Returns: both lists in the order of the ranks; counted from the start of its stretch, and of what it needs.

    Example: stretches of 6 tokens on two ranks, of which the second needs 2: rank 0 sends it (4, 6), and rank 1
        receives (0, 2).
    """

    def overlap(holder: int, needer: int, origin: int) -> tuple[int, int]:
        first, last = max(starts[holder], starts[needer] - needs[needer]), min(starts[holder + 1], starts[needer])
        return (first - origin, last - origin) if first < last else (0, 0)

    ranks = range(len(needs))
    sends = [overlap(rank, other, starts[rank]) for other in ranks]
    return sends, [overlap(other, rank, starts[rank] - needs[rank]) for other in ranks]


@dataclass(frozen=True, eq=False)
class Halo:
    """The plan of one forward on one rank. Pairs are for the straight and for the shifted half of the heads.

    Attributes:
        groups: the groups of this rank's stretch; parts of the first and last group on other ranks are left out.
        needs: the number of tokens of earlier ranks in the group of the first token.
        owns: the number of tokens of that group on this rank, 0 if the group begins here.
        sends: own tokens that each rank needs. receives: the place of each rank's tokens in the halo.
        is_needed: whether any rank needs a halo; if not, nothing is exchanged.
        group: the ranks that share the sequence.
    """

    groups: Groups
    needs: tuple[int, int]
    owns: tuple[int, int]
    sends: Ranges
    receives: Ranges
    is_needed: bool
    group: dist.ProcessGroup | None = None


def plan_halo(
    edges: list[Edges],
    rank: int,
    documents: Documents,
    group: dist.ProcessGroup | None = None,
) -> Halo:
    """Compute who sends what to whom. Every rank does the same arithmetic and gets the same result.

    Args:
        edges: those of all ranks, from `exchange_edges`.
        rank: the number of this rank, in the order of the sequence.
        documents: those of this rank's stretch. group: the process group of the ranks.

    Example: two ranks of 6 tokens of one document, G = 4: rank 1 begins with token 6, inside the straight group [4, 8)
        and at the start of the shifted group [6, 10): it needs tokens 4 and 5 of the straight half, and nothing else.
    """
    group_size, pattern = edges[0].group_size, PATTERNS[edges[0].pattern]
    shifts = 0, shift_of(group_size, pattern)
    before, after = tokens_elsewhere(edges)
    starts = [0, *accumulate(edge.length for edge in edges)]
    needs = []
    for one, edge in enumerate(edges):
        whole = before[one] + edge.head + (after[one] if edge.head == edge.length else 0)
        needs.append(tuple(before[one] and tokens_before(whole, group_size, shift, before[one]) for shift in shifts))
    halves = [plan_exchange(starts, [need[half] for need in needs], rank) for half in (0, 1)]
    sends, receives = (tuple(zip(*both, strict=True)) for both in zip(*halves, strict=True))
    elsewhere = dict(before=before[rank], after=after[rank])
    groups = plan_groups(1, edges[rank].length, group_size, pattern, documents=documents, **elsewhere)
    first_ends = groups.straight[1], groups.shifted[1]
    owns = tuple(end if need else 0 for need, end in zip(needs[rank], first_ends, strict=True))
    return Halo(groups, needs[rank], owns, sends, receives, any(map(any, needs)), group)

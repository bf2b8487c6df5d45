"""Where one attention is cut, in the form that its backend needs: numbers on the host, or tensors that compile.

`Boundaries` defines the format of the tensors: how they are written and read, and how large they can be.
attention's `mask` (once a forward) and `s2_attention` make cuts; `operators`, `sdpa` and `flex` read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Optional

import torch

from peft_longlora.kernels.blocks import BlockPlan
from peft_longlora.kernels.groups import Groups, plan_from_segment_ids, plan_groups

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Boundaries:
    """Boundaries of both halves of the heads and the stretches of padding, in flattened tokens.

    As tensors it is a pair, because torch.compile does not guard on numbers inside tensors:
        layout: int32 on the CPU: n, m, p, the n straight boundaries, the m shifted ones, and p numbers: start and end
            of each stretch of padding. Numbers after these are ignored.
        cu_seqlens: int32 on the device: the straight boundaries, then the shifted ones.
    """

    straight: tuple[int, ...]
    shifted: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, groups: Groups) -> Boundaries:
        """Those of a plan; neighbouring pieces of padding become one stretch."""
        ends: list[int] = []
        for start, end in pairwise(groups.straight):
            if start in groups.padding_starts:
                ends = [*ends[:-1], end] if ends[-1:] == [start] else [*ends, start, end]
        return cls(groups.straight, groups.shifted, tuple(zip(ends[::2], ends[1::2], strict=True)))

    def write(self) -> tuple[list[int], list[int]]:
        """The numbers of layout, and those of cu_seqlens."""
        boundaries = [*self.straight, *self.shifted]
        ends = [end for stretch in self.padding for end in stretch]
        return [len(self.straight), len(self.shifted), len(ends), *boundaries, *ends], boundaries

    @classmethod
    def read(cls, layout: torch.Tensor) -> Boundaries:
        """Read them from a layout tensor."""
        n, m, p = layout[:3].tolist()
        rest = layout[3 : 3 + n + m + p].tolist()
        ends = rest[n + m :]
        return cls(tuple(rest[:n]), tuple(rest[n : n + m]), tuple(zip(ends[::2], ends[1::2], strict=True)))

    @staticmethod
    def most(tokens: int) -> tuple[int, int]:
        """The largest sizes of both tensors: every token is a piece, or every second token is padding."""
        return 3 + 2 * (tokens + 1) + tokens + 1, 2 * (tokens + 1)

    @property
    def is_split(self) -> bool:
        """Whether the halves differ."""
        return self.straight != self.shifted

    def max_length(self, half: str) -> int:
        """Tokens of the longest piece of a half."""
        return max((end - start for start, end in pairwise(getattr(self, half))), default=0)

    def span(self, half: str) -> slice:
        """The place of a half's boundaries in cu_seqlens."""
        n = len(self.straight)
        return slice(0, n) if half == "straight" else slice(n, n + len(self.shifted))


def tensors_of(groups: Groups, device: torch.device) -> Pair:
    """Layout and cu_seqlens of a plan, made once for each device."""

    def make() -> Pair:
        layout, boundaries = (torch.tensor(x, dtype=torch.int32, device="cpu") for x in Boundaries.of(groups).write())
        if device.type == "cuda":  # pinned, so that the copy does not wait for the device
            boundaries = boundaries.pin_memory().to(device, non_blocking=True)
        return layout, boundaries

    return groups.once(device, make)


@lru_cache(maxsize=64)
def regular_groups(batch: int, length: int, group_size: int, pattern: str) -> Groups:
    """The plan of rows without documents. It is cached, so that layers and steps share its tensors."""
    return plan_groups(batch, length, group_size, pattern)


def find_groups(segment_ids: torch.Tensor | None, batch: int, length: int, group_size: int, pattern: str) -> Groups:
    """The plan of (B, S) segment ids. With None every row is one document."""
    if segment_ids is None:
        return regular_groups(batch, length, group_size, pattern)
    return plan_from_segment_ids(segment_ids, group_size, pattern)


@torch.library.custom_op("peft_longlora::plan_tensors", mutates_args=())
def plan_tensors(
    segment_ids: Optional[torch.Tensor],  # noqa: UP045 (torch 2.11 reads no `|` here)
    batch: int,
    length: int,
    group_size: int,
    pattern: str,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tensors_of` a plan, as an operator. Compiled code then contains no number of tokens, so lengths may change.

    The tensors are as large as the largest plan of B * S tokens, because a shape that depends on data breaks the graph.
    """
    found = tensors_of(find_groups(segment_ids, batch, length, group_size, pattern), device)
    tensors = [x.new_empty(size) for x, size in zip(found, Boundaries.most(batch * length), strict=True)]
    for room, x in zip(tensors, found, strict=True):
        room[: len(x)] = x
    return tuple(tensors)


@plan_tensors.register_fake
def _(segment_ids, batch, length, group_size, pattern, device):
    sizes = Boundaries.most(batch * length)
    layout = torch.empty(sizes[0], dtype=torch.int32, device="cpu")
    return layout, torch.empty(sizes[1], dtype=torch.int32, device=device)


@dataclass(eq=False)
class Cuts:
    """Where one attention is cut. Compiled code asks only for the tensors, and knows no number of tokens.

    Attributes:
        batch, length: B and S, tokens.
        make_groups: makes the plan as numbers, outside compiled code.
        make_tensors: makes it as tensors, inside compiled code, with the operator `plan_tensors`.
        blocks: in place of groups, the plan of a pattern that sees blocks of keys.
        window: keys that a query sees of its piece, itself included; 0 for all.
    """

    batch: int
    length: int
    make_groups: Callable[[], Groups] | None
    make_tensors: Callable[[], Pair] | None = None
    blocks: BlockPlan | None = None
    window: int = 0
    _groups: Groups | None = field(default=None, init=False)

    @classmethod
    def of(cls, groups: Groups, window: int = 0) -> Cuts:
        """The cuts of a ready plan. A window that holds every piece is none."""
        return cls(groups.batch, groups.length, lambda: groups, window=window if window < groups.max_length else 0)

    @classmethod
    def by_blocks(cls, plan: BlockPlan) -> Cuts:
        """Of a pattern that sees blocks of keys, and has no groups."""
        return cls(plan.batch, plan.length, None, blocks=plan)

    @property
    def is_regular(self) -> bool:
        """Whether the pieces have few different lengths; False in compiled code, which must not know lengths."""
        return not torch.compiler.is_compiling() and self.groups().is_regular

    def groups(self) -> Groups:
        """The plan as numbers."""
        if self._groups is None:
            self._groups = self.make_groups()
        return self._groups

    def tensors(self, device: torch.device) -> Pair:
        """The plan as layout and cu_seqlens."""
        if torch.compiler.is_compiling() and self.make_tensors is not None:
            return self.make_tensors()
        return tensors_of(self.groups(), device)

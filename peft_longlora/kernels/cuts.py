"""A plan as its backend takes it: host numbers, or tensors that compile."""

from __future__ import annotations

from functools import lru_cache
from typing import Optional

import torch

from peft_longlora.kernels.groups import Groups, plan_from_segment_ids, plan_groups


@lru_cache(maxsize=64)
def regular_groups(batch: int, length: int, group_size: int, pattern: str) -> Groups:
    """The plan of rows without documents: kept, so that layers and steps share its tensors."""
    return plan_groups(batch, length, group_size, pattern)


@torch.library.custom_op("peft_longlora::plan", mutates_args=())
def plan(
    segment_ids: Optional[torch.Tensor],  # noqa: UP045 (torch 2.11 reads no `|` here)
    batch: int,
    length: int,
    group_size: int,
    pattern: str,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Groups.tensors` of a plan, as an operator: compiled code holds no number of tokens, so lengths may change.

    What it returns is as large as the largest plan of B * S tokens, because a shape that depends on data breaks graphs.
    """
    if segment_ids is None:
        groups = regular_groups(batch, length, group_size, pattern)
    else:
        groups = plan_from_segment_ids(segment_ids, group_size, pattern)
    tensors = [x.new_empty(size) for x, size in zip(groups.tensors(device), _most(batch * length), strict=True)]
    for room, x in zip(tensors, groups.tensors(device), strict=True):
        room[: len(x)] = x
    return tuple(tensors)


def _most(tokens: int) -> tuple[int, int]:
    """Sizes of `Groups.tensors` where every token is a piece, or every second one a stretch of padding."""
    return 3 + 2 * (tokens + 1) + tokens + 1, 2 * (tokens + 1)

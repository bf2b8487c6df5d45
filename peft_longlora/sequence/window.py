"""Layers with a sliding window, if ranks share the sequence: the halo is the window's tokens before a rank's stretch.

The halo's keys and values are put in front of the rank's own, and a kernel with a window attends to all of them. Its
queries are padded to the same length; what they give is dropped. That costs as many queries as the window has tokens,
and does not grow with the sequence. Called by `layer`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from peft_longlora.kernels.attend import attend as attend_in_groups
from peft_longlora.kernels.attend import checked
from peft_longlora.kernels.backends import windowed
from peft_longlora.kernels.cuts import Cuts
from peft_longlora.kernels.groups import plan_groups
from peft_longlora.kernels.kernel import Options
from peft_longlora.sequence.edges import Documents, Edges, Ranges, plan_exchange, tokens_elsewhere
from peft_longlora.sequence.halo import Kept, bring, send_back


@dataclass(frozen=True, eq=False)
class Window:
    """The plan of one forward on one rank.

    Attributes:
        cuts: of the halo and the stretch together.
        needs: tokens of earlier ranks that the first token sees.
        sends, receives: as `edges.Halo`, for all heads at once.
        is_needed: whether any rank needs a halo. group: the ranks that share the sequence.
    """

    cuts: Cuts
    needs: int
    sends: Ranges
    receives: Ranges
    is_needed: bool
    group: dist.ProcessGroup | None = None


def plan_window(
    edges: list[Edges], rank: int, documents: Documents, window: int, group: dist.ProcessGroup | None = None
) -> Window:
    """Compute who sends what to whom. Every rank does the same arithmetic and gets the same result.

    Args:
        edges: those of all ranks, from `edges.exchange_edges`.
        rank: the number of this rank, in the order of the sequence.
        documents: those of this rank's stretch. window: keys that a query sees, itself included.

    Example: two ranks of 6 tokens of one document, a window of 4: rank 1 needs tokens 3 to 5.
    """
    before, _ = tokens_elsewhere(edges)
    starts = [0, *accumulate(edge.length for edge in edges)]
    needs = [min(tokens, window - 1) for tokens in before]
    own = needs[rank]
    sends, receives = (tuple((one,) for one in ranges) for ranges in plan_exchange(starts, needs, rank))
    (_, tokens, number), *others = documents
    whole = [(0, own + tokens, number), *((start + own, tokens, number) for start, tokens, number in others)]
    groups = plan_groups(1, own + edges[rank].length, 2, "full", documents=whole)
    return Window(Cuts.of(groups, window), own, sends, receives, any(needs), group)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Window, options: Options, kept: Kept
) -> torch.Tensor:
    """Attention of this rank's stretch: (1, H, S, D), (1, H_kv, S, D) -> (1, S, H, D_v). Errors as `kernels.attend`.

    Args:
        kept: an empty object is filled; if the layer filled it in this forward, nothing is exchanged.
    """
    query, key, value = checked(query, key, value, options)
    # (1, H_kv, S, D) -> (S, H_kv, D), and back
    far = _Bring.apply(*(x[0].transpose(0, 1) for x in (key, value)), plan, kept)
    key, value = (torch.cat([x.transpose(0, 1)[None], y], dim=2) for x, y in zip(far, (key, value), strict=True))
    query = pad(query, (0, 0, plan.needs, 0))
    options = replace(options, backend=windowed(options.backend))
    return attend_in_groups(query, key, value, plan.cuts, options)[:, plan.needs :]


class _Bring(torch.autograd.Function):
    """The halo: (S, H_kv, D), (S, H_kv, D_v) -> (T, H_kv, D), (T, H_kv, D_v) of earlier ranks."""

    @staticmethod
    def forward(ctx: Any, key: torch.Tensor, value: torch.Tensor, plan: Window, kept: Kept):
        ctx.plan, ctx.shapes = plan, (key.shape, value.shape)
        if not kept.far:
            kept.far = bring(plan, [(key, value)], (plan.needs,))
        return tuple(x.clone() for x in kept.far[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):
        own = tuple(grad.new_zeros(shape) for grad, shape in zip(gradients, ctx.shapes, strict=True))
        send_back(ctx.plan, [gradients], [own])
        return *own, None, None

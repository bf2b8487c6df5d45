"""Dense attention over a sequence that ranks share: each rank gets the whole sequence of some heads (Ulysses).

It is for evaluation and for dense layers. PyTorch's DTensor does the exchange; its traffic grows with the sequence.
Called by `layer`. Source: DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from peft_longlora.kernels.attend import attend as attend_in_groups
from peft_longlora.kernels.cuts import Cuts
from peft_longlora.kernels.groups import Groups, plan_groups
from peft_longlora.kernels.kernel import Options
from peft_longlora.sequence.edges import Documents, Edges, is_continued


def plan_whole(edges: list[Edges], documents: Documents, group: dist.ProcessGroup) -> Groups:
    """The plan of dense attention inside each document of the whole sequence, the same on every rank.

    Args:
        edges: those of all ranks, from `edges.exchange_edges`. documents: those of this rank's stretch.

    Raises: ValueError, on all ranks: the stretches have different lengths.
    """
    lengths = [edge.length for edge in edges]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"Dense attention over a shared sequence needs stretches of one length; they have {lengths} tokens. Cut "
            f"the batch with shard_batch, which pads."
        )
    everyone: list[Documents | None] = [None] * len(edges)
    dist.all_gather_object(everyone, documents, group)
    whole: Documents = []
    for rank, theirs in enumerate(everyone):
        for index, (start, tokens, number) in enumerate(theirs):
            if index == 0 and is_continued(edges, rank):
                begin, so_far, _ = whole.pop()
                whole.append((begin, so_far + tokens, number))
            else:
                whole.append((rank * lengths[0] + start, tokens, number))
    return plan_groups(1, sum(lengths), 2, "full", documents=whole)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Groups, mesh: DeviceMesh, options: Options
) -> torch.Tensor:
    """Dense causal attention: (1, H, S, D), (1, H_kv, S, D) of this rank -> (1, S, H, D_v) of this rank.

    Args:
        groups: from `plan_whole`.
    """
    ranks, heads, kv_heads = mesh.size(), query.shape[1], key.shape[1]
    if options.sinks is not None:  # of this rank's heads, as DTensor cuts them
        own = [*options.sinks.chunk(ranks), *[options.sinks[:0]] * ranks]
        options = replace(options, sinks=own[mesh.get_local_rank()])
    if heads % ranks or kv_heads % ranks:  # then KV heads are repeated, and go with their query heads
        key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    # (1, H, S, D) -> (1, H / n, n S, D)
    query, key, value = (_reshard(x, mesh, x.shape[2] * ranks) for x in (query, key, value))
    if query.shape[1]:
        out = attend_in_groups(query, key, value, Cuts.of(groups), options)
    else:  # fewer heads than ranks: this rank has none, but takes part in the exchanges of the backward
        out = value.transpose(1, 2) + query.sum() + key.sum()
        if options.sinks is not None:
            out = out + options.sinks.sum()
    # (1, n S, H / n, D_v) -> (1, S, H, D_v)
    return _reshard(out, mesh, heads)


def _reshard(x: torch.Tensor, mesh: DeviceMesh, size: int) -> torch.Tensor:
    """Exchange a part of dimension 2, whose whole size is `size`, for a part of dimension 1; differentiable."""
    from torch.distributed.tensor import DTensor, Shard  # importing it takes a second

    shape = torch.Size([*x.shape[:2], size, *x.shape[3:]])
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(x.contiguous(), mesh, [Shard(2)], run_check=False, shape=shape, stride=stride)
    return whole.redistribute(placements=[Shard(1)]).to_local()

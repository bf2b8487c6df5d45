"""Bytes that a rank of `scaling.py` exchanges with the others in a step."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts what passes the collectives of attention, and what FSDP2 gathers.

    Attributes:
        sent: bytes that this rank sends for attention. gathered: bytes of weights that it gets from other ranks.
    """

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.sent, self.gathered = ranks, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(x, DTensor) for x in types):
            return NotImplemented  # seen when it comes apart into what it exchanges and computes
        name = function.name()
        if "alltoall_base_" in name:  # the halo's: output, input, and nothing to oneself
            self.sent += args[1].nbytes
        elif name.startswith("_c10d_functional::all_to_all_single"):  # torch's ring, where it rotates
            parts = [x for rank, x in enumerate(args[2]) if rank != dist.get_rank()]
            self.sent += args[0].numel() // args[0].shape[0] * sum(parts) * args[0].element_size()
        elif "shard_dim_alltoall" in name or "all_gather_into_tensor" in name:
            size = args[0].nbytes
            self.sent += size * (self.ranks - 1) if "all_gather" in name else size * (self.ranks - 1) // self.ranks
        elif "_allgather_base_" in name:  # FSDP2's: output, input
            self.gathered += args[0].nbytes - args[1].nbytes
        return function(*args, **(kwargs or {}))

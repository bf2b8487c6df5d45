"""What checkpointed blocks keep waits in the host's memory, and travels while the GPU computes.

A block's input, (B, S, hidden), is all that a checkpointed block keeps; over all blocks that is most of a long step's
memory. Here it is copied to pinned memory on a stream of its own as soon as the block has begun, and comes back one
block ahead of the backward. transformers' own `offload=True` copies on the stream that computes, so there each copy is
added to the step. Called by `blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import ref

import torch
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 2**20  # smaller tensors stay where they are


class _Away:
    """A tensor that waits in the host's memory.

    Attributes:
        host: its copy, in pinned memory. copied: the event after which the copy is whole.
        here: the tensor back on the device, or None. arrived: the event after which it is whole.
    """

    def __init__(self, tensor: torch.Tensor, host: torch.Tensor, stream: torch.cuda.Stream):
        self.device, self.host, self.stream = tensor.device, host, stream
        self.here: torch.Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given away before it is copied

    def fetch(self) -> None:
        """Start to bring it back."""
        if self.here is None:
            with torch.cuda.stream(self.stream):
                self.here = torch.empty_like(self.host, device=self.device, pin_memory=False)
                self.here.copy_(self.host, non_blocking=True)
                self.arrived = self.stream.record_event()

    def get(self) -> torch.Tensor:
        """The tensor on its device, whole."""
        self.fetch()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.arrived)
        self.here.record_stream(current)
        return self.here


class Offload:
    """Wraps a checkpoint function, so that what it saves waits in the host's memory until the backward is near.

    Args:
        checkpoint: as `torch.utils.checkpoint.checkpoint`, with its options filled in; not reentrant.
        ahead: how many tensors are on their way back at a time.
    """

    def __init__(self, checkpoint: Callable[..., Any], ahead: int = 1):
        self.checkpoint, self.ahead = checkpoint, ahead
        self._away: list[ref[_Away]] = []  # in the order of the forward; a graph that is dropped takes its own along
        self._spare: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` on `args`, and compute it again in the backward."""
        is_on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in args)
        with saved_tensors_hooks(self._pack, self._unpack) if is_on_gpu else nullcontext():
            return self.checkpoint(function, *args)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Away:
        is_large = tensor.is_cuda and tensor.nbytes >= LEAST_BYTES
        if not is_large or isinstance(tensor, torch.nn.Parameter):
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        away = _Away(tensor, self._room(tensor), self._stream)
        self._away = [one for one in self._away if one() is not None] + [ref(away)]
        return away

    def _unpack(self, packed: torch.Tensor | _Away) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        tensor = packed.get()
        waiting = [one() for one in self._away if one() is not None]
        if packed in waiting:  # the first time
            waiting = waiting[: waiting.index(packed)]
            self._away = [ref(one) for one in waiting]
            self._spare.setdefault((packed.host.shape, packed.host.dtype), []).append(packed.host)
        for one in waiting[-self.ahead :]:
            one.fetch()
        return tensor

    def _room(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pinned memory for a tensor. Pinning takes seconds a gigabyte, so it is used again step after step."""
        if spare := self._spare.get((tensor.shape, tensor.dtype)):
            return spare.pop()  # one stream makes all copies, so one out of it comes before the next one into it
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

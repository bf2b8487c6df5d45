"""Tensors that wait in the host's memory, and are copied while the GPU computes.

`offload` puts the inputs of blocks there, `keep` the outputs of attention. They leave on a separate stream as soon as a
block has begun, and come back one block before their backward.

The host runs far ahead of the GPU. So memory is not given back by `record_stream`, which would keep the inputs of all
blocks that the host has already queued. Instead the computing stream waits until an older copy is over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import finalize, ref

import torch

LEAST_BYTES = 2**20  # smaller tensors stay on the GPU
LEAVING = 2  # tensors that may be on their way to the host at once
CHUNK = 2**24  # bytes of a piece of pinned memory. Tensors of any size are cut, so rows of any length share the pieces
SLAB = 2**28  # bytes that are pinned at once; PyTorch rounds them up to a power of two


class _Away:
    """A tensor that waits in the host's memory.

    Attributes:
        block: number of its block. size: its bytes. chunks: its copy, pieces of pinned memory.
        user: the stream that computes with it, and to which its memory goes back.
        leaving: the tensor until it is copied, and its version. copied: the event after which it is.
        here: the tensor on its way back to the device, or None. arrived: the event after which it is whole.
    """

    def __init__(self, tensor: torch.Tensor, chunks: list[torch.Tensor], stream: torch.cuda.Stream, block: int):
        self.shape, self.dtype, self.device, self.size = tensor.shape, tensor.dtype, tensor.device, tensor.nbytes
        self.chunks, self.stream, self.block = chunks, stream, block
        self.leaving: torch.Tensor | None = tensor
        self.version = tensor._version
        self.here: torch.Tensor | None = None
        self.copied: torch.cuda.Event | None = None
        self.arrived: torch.cuda.Event | None = None
        self.user = torch.cuda.current_stream(self.device)
        stream.wait_stream(self.user)
        with torch.cuda.stream(stream):
            for chunk, part in self._pairs(tensor):
                chunk.copy_(part, non_blocking=True)
            self.copied = stream.record_event()

    def leave(self) -> None:
        """Give the tensor's memory on the device back. The computing stream uses it again after the copy.

        Raises: RuntimeError: something has changed the tensor in place, so the copy may hold either of the two.
        """
        if self.leaving is not None:
            if self.leaving._version != self.version:
                raise RuntimeError(
                    f"A tensor of shape {tuple(self.shape)} that block {self.block} needs in its backward has been "
                    f"changed in place while it was copied to the host's memory. Change a copy of it (x = x + y), or "
                    f"call checkpoint_blocks without offload and keep_in_host."
                )
            self.user.wait_event(self.copied)
            self.leaving = None

    def fetch(self) -> None:
        """Start to bring it back."""
        if self.here is None and self.leaving is None:
            self.user = torch.cuda.current_stream(self.device)
            self.here = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.stream.wait_stream(self.user)  # others have used this memory until now
            with torch.cuda.stream(self.stream):
                for chunk, part in self._pairs(self.here):
                    part.copy_(chunk, non_blocking=True)
                self.arrived = self.stream.record_event()

    def get(self) -> torch.Tensor:
        """The tensor on its device, whole. It is not held here: autograd holds this object until the backward ends."""
        if (tensor := self.leaving) is not None:  # the last blocks' tensors are needed before they have left
            self.leave()
            return tensor
        self.fetch()
        torch.cuda.current_stream(self.device).wait_event(self.arrived)
        tensor, self.here = self.here, None
        return tensor

    def __del__(self):
        # A graph was dropped: nobody else waits for its copies before the memory is used again. An interrupt may have
        # come before their event, and the thread that drops it may compute on another stream.
        if self.leaving is not None or self.here is not None:
            self.user.wait_stream(self.stream)

    def _pairs(self, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each piece of pinned memory, and the part of the tensor that it holds, as bytes."""
        parts = tensor.view(-1).view(torch.uint8).split(CHUNK)
        for chunk, part in zip(self.chunks, parts, strict=True):
            yield chunk[: len(part)], part


class HostMemory:
    """Tensors that wait in the host's memory. All blocks of a model share one object; a copied model's begins empty.

    Each GPU has a place of its own: a model may lie on several (device_map), and replicas (nn.DataParallel) run in
    threads, a GPU each.
    """

    def __init__(self):
        self._places: dict[torch.device, _Place] = {}

    def __reduce__(self) -> Any:
        return HostMemory, ()

    @property
    def most(self) -> int:
        """Bytes that have waited at once."""
        return sum(place.most for place in self._places.values())

    def put(self, tensor: torch.Tensor, block: int) -> Any:
        """Start to copy a GPU tensor of a block to the host; returns what `get` takes. Small tensors stay."""
        return self._places.setdefault(tensor.device, _Place()).put(tensor, block) if _leaves(tensor) else tensor

    def get(self, packed: Any) -> torch.Tensor:
        """The tensor on its device. Also starts to copy back what this block and the block before it need."""
        return self._places[packed.device].get(packed) if isinstance(packed, _Away) else packed


class _Place:
    """Tensors of one GPU that wait, in the order of the forward."""

    def __init__(self):
        self._away: list[ref[_Away]] = []  # a dropped graph frees its own
        self._spare: list[torch.Tensor] = []  # pieces of pinned memory
        self._stream: torch.cuda.Stream | None = None
        self.most = 0  # bytes that have waited at once

    def put(self, tensor: torch.Tensor, block: int) -> _Away:
        """As `HostMemory.put`."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        tensor = tensor.contiguous()  # may run out of memory, so it comes before any piece is taken
        away = _Away(tensor, self._room(tensor.nbytes), self._stream, block)
        # Whoever needs the tensor once more finds it there until then.
        finalize(away, self._spare.extend, away.chunks).atexit = False
        waiting = [*self._waiting(), away]
        for one in waiting[:-LEAVING]:
            one.leave()
        self._away = [ref(one) for one in waiting]
        self.most = max(self.most, sum(one.size for one in waiting))
        return away

    def get(self, packed: _Away) -> torch.Tensor:
        """As `HostMemory.get`."""
        waiting = self._waiting()
        if packed in waiting:  # the first time
            index = waiting.index(packed)
            for one in waiting[index:]:
                if one.block == packed.block:
                    one.fetch()
            waiting = waiting[:index]
            self._away = [ref(one) for one in waiting]
        tensor = packed.get()
        next_block = waiting[-1].block if waiting else None
        for one in reversed(waiting):
            if one.block != next_block:
                break
            one.fetch()
        return tensor

    def _waiting(self) -> list[_Away]:
        found = (one() for one in self._away)
        return [one for one in found if one is not None]

    def _room(self, size: int) -> list[torch.Tensor]:
        """Pinned memory for so many bytes. Pinning a gigabyte takes seconds, so the memory is reused in every step.

        One stream makes all copies, so reading a piece ends before it is written again.
        """
        count = -(-size // CHUNK)
        while len(self._spare) < count:
            self._spare.extend(_pinned(SLAB).split(CHUNK))
        room = self._spare[:count]
        del self._spare[:count]
        return room


def _leaves(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and tensor.nbytes >= LEAST_BYTES and not isinstance(tensor, torch.nn.Parameter)


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)

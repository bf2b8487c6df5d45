"""Tensors of checkpointed blocks wait in the host's memory, and are copied while the GPU computes.

A checkpointed block keeps only its input, (B, S, hidden). Over all blocks that is most of a long step's memory. Here
the input is copied to pinned memory on a separate stream as soon as the block has begun, and comes back one block
before its backward. transformers' own `offload=True` copies on the computing stream, so there each copy makes the step
longer. Called by `blocks`; `keep` uses the same place for the outputs of attention.

The host runs far ahead of the GPU. So memory is not given back by `record_stream`, which would keep the inputs of all
blocks that the host has already queued. Instead the computing stream waits until an older copy is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import finalize, ref

import torch
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 2**20  # smaller tensors stay on the GPU
LEAVING = 2  # tensors that may be on their way to the host at once
CHUNK = 2**24  # bytes of a piece of pinned memory. Tensors of any size are cut, so rows of any length share the pieces
SLAB = 2**28  # bytes that are pinned at once; PyTorch rounds them up to a power of two


class _Away:
    """A tensor that waits in the host's memory.

    Attributes:
        block: number of its block. size: its bytes. chunks: its copy, pieces of pinned memory.
        leaving: the tensor until it is copied. copied: the event after which it is.
        here: the tensor on its way back to the device, or None. arrived: the event after which it is whole.
    """

    def __init__(self, tensor: torch.Tensor, chunks: list[torch.Tensor], stream: torch.cuda.Stream, block: int):
        self.shape, self.dtype, self.device, self.size = tensor.shape, tensor.dtype, tensor.device, tensor.nbytes
        self.chunks, self.stream, self.block = chunks, stream, block
        self.leaving: torch.Tensor | None = tensor.contiguous()
        self.here: torch.Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for chunk, part in self._pairs(self.leaving):
                chunk.copy_(part, non_blocking=True)
            self.copied = stream.record_event()

    def leave(self) -> None:
        """Give the tensor's memory on the device back. The computing stream uses it again after the copy."""
        if self.leaving is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.leaving = None

    def fetch(self) -> None:
        """Start to bring it back."""
        if self.here is None and self.leaving is None:
            self.here = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # others have used this memory until now
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
        # A graph was dropped: nobody else waits for its copies before the memory is used again.
        for tensor, event in ((self.leaving, self.copied), (self.here, self.arrived)):
            if tensor is not None:
                torch.cuda.current_stream(self.device).wait_event(event)

    def _pairs(self, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each piece of pinned memory, and the part of the tensor that it holds, as bytes."""
        parts = tensor.view(-1).view(torch.uint8).split(CHUNK)
        for chunk, part in zip(self.chunks, parts, strict=True):
            yield chunk[: len(part)], part


@dataclass(frozen=True)
class _Again:
    """A tensor that is not kept: the block before computes it again from its own input.

    Attributes:
        function: the block before, with all arguments except the input. packed: its input.
        random: the states of the random number generators when it ran, for dropout. precision: autocast then.
    """

    function: Callable[..., Any]
    packed: Any
    random: tuple[torch.Tensor, torch.Tensor | None]
    precision: torch.autocast


@dataclass(frozen=True)
class _Given:
    """What a block gave the next one: its output, of a version (in-place changes raise it), and how to compute that
    block's input again."""

    output: ref[torch.Tensor]
    version: int
    again: _Again

    def leads_to(self, tensor: torch.Tensor) -> bool:
        return self.output() is tensor and self.version == tensor._version


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


class Offload:
    """Wraps the checkpoint function of one block, so that the block's input leaves the GPU until its backward is near.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` with its options; not reentrant.
        host: the place where inputs wait.
        block: number of the block.
        module: the block itself.
        before: the `Offload` of the block before, if that block computes this block's input again; None: the input
            waits in the host's memory. If every second block has one, this needs half the host's memory and half a
            forward more. That block may have its input from the one before it in the same way.
    """

    def __init__(
        self,
        checkpoint: Callable[..., Any],
        host: HostMemory,
        block: int,
        module: torch.nn.Module,
        before: Offload | None = None,
    ):
        self.checkpoint, self.host, self.block, self.module, self.before = checkpoint, host, block, module, before
        self._is_followed = False
        self._last: _Given | None = None  # for the next block, until it has run
        if before is not None:
            before._is_followed = True

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` on `args`, and compute it again in the backward."""
        # Not the input itself: torch keeps `pack` until the backward is over. Others are small (Gemma 4: each block's
        # part of a tensor that is there in any case).
        address, others = args[0].data_ptr(), args[1:]
        # Not where another layer stands between the two (layers with a state in hybrids), or something is added. Read
        # and written as one object, because replicas of the model in other threads (nn.DataParallel) share this one.
        given = self.before._last if self.before is not None else None
        last = given.again if given is not None and given.leads_to(args[0]) else None
        again = None

        def pack(tensor: torch.Tensor) -> Any:
            nonlocal again
            is_input = tensor.data_ptr() == address
            if is_input and last is not None:
                packed: Any = last
            else:
                packed = self.host.put(tensor, self.block)
            if is_input and self._is_followed:
                states = _random_states(tensor.device), _precision(tensor.device.type)
                again = _Again(lambda x: function(x, *others), packed, *states)
            return packed

        try:
            with saved_tensors_hooks(pack, self._unpack):
                out = self.checkpoint(function, *args)
            if again is not None:
                tensor = out[0] if isinstance(out, tuple) else out
                self._last = _Given(ref(tensor), tensor._version, again)
            return out
        except BaseException:  # no next block will take it
            self._last = None
            raise
        finally:
            again = None  # torch keeps `pack`, and with it what this name holds
            if self.before is not None:
                self.before._last = None

    def forget(self) -> None:
        """Drop what a step has left that ended with an error between two blocks."""
        self._last = None

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Again):
            return self.host.get(packed)
        if unshard := getattr(self.before.module, "unshard", None):  # FSDP2 brings weights for a block's own backward
            unshard()
        tensor = self._unpack(packed.packed)
        devices = [tensor.device] if tensor.is_cuda else []
        with torch.no_grad(), packed.precision, torch.random.fork_rng(devices=devices):
            cpu, gpu = packed.random
            torch.set_rng_state(cpu)
            if gpu is not None:
                torch.cuda.set_rng_state(gpu, tensor.device)
            out = packed.function(tensor)
        return out[0] if isinstance(out, tuple) else out


def _leaves(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and tensor.nbytes >= LEAST_BYTES and not isinstance(tensor, torch.nn.Parameter)


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _random_states(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _precision(device: str) -> torch.autocast:
    dtype, is_on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype=dtype, enabled=is_on)

"""The input of a checkpointed block waits in the host's memory, or is computed again by the block before.

A checkpointed block keeps only its input, (B, S, hidden). Over all blocks that is most of a long step's memory. Here
the input is copied to pinned memory (`places`) while the GPU computes. transformers' own `offload=True` copies on the
computing stream, so there each copy makes the step longer. Called by `blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch.autograd.graph import saved_tensors_hooks

from peft_longlora.memory.places import HostMemory


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


def _random_states(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _precision(device: str) -> torch.autocast:
    dtype, is_on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype=dtype, enabled=is_on)

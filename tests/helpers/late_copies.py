"""A GPU's stream of copies on a CPU: each copy is made as late as the waiting for it allows, so a race shows.

The computing stream is the CPU, which is done with what it has begun. A copy of another stream is made when the
computing stream waits for it. If what it reads or writes has been freed by then, another tensor might be there.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_longlora.memory import places
from tests.helpers.host_copies import leaves


class Races(list):
    """Copies whose memory was freed before they were made."""

    def __init__(self):
        super().__init__()
        self.streams: list[Stream] = []

    def finish(self) -> int:
        """Make what nobody has waited for; the number of copies in all."""
        for stream in self.streams:
            stream.wait_stream(stream)
        return sum(stream.done for stream in self.streams)


class Stream:
    """As `torch.cuda.Stream`; `races` is shared by a test."""

    def __init__(self, races: Races):
        self.races, self.copies, self.done = races, [], 0
        races.streams.append(self)

    def record_event(self):
        return self, self.done + len(self.copies)

    def wait_event(self, event):
        stream, number = event
        while stream.done < number:
            stream.copies.pop(0)()
            stream.done += 1

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class _Queue(TorchDispatchMode):
    def __init__(self, stream: Stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.copy_.default:
            return function(*args, **(kwargs or {}))
        self.stream.copies.append(_Copy(*args[:2], self.stream.races))
        return args[0]


class _Copy:
    def __init__(self, to: torch.Tensor, source: torch.Tensor, races: Races):
        self.ends, self.races = [_Weak(to), _Weak(source)], races

    def __call__(self):
        to, source = (one.tensor() for one in self.ends)
        if to is None or source is None:
            self.races.append(f"{'source' if source is None else 'target'} of {self.ends[0].bytes} bytes")
        else:
            to.copy_(source)


class _Weak:
    """A tensor that this object does not keep."""

    def __init__(self, tensor: torch.Tensor):
        self.storage, self.bytes = tensor.untyped_storage()._weak_ref(), tensor.nbytes
        self.like = tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self) -> torch.Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage)
        if storage is None:
            return None
        dtype, *place = self.like
        return torch.empty(0, dtype=dtype).set_(storage, *place)


def on_late_stream(monkeypatch) -> Races:
    """Let `places` use such a stream for tensors of a CPU; returns the list of races."""
    races = Races()
    computing = Stream(races)

    @contextmanager
    def within(stream):
        with _Queue(stream):
            yield

    monkeypatch.setattr(places.torch.cuda, "Stream", lambda device: Stream(races))
    monkeypatch.setattr(places.torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(places.torch.cuda, "stream", within)
    monkeypatch.setattr(places, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(places, "_leaves", leaves)
    monkeypatch.setattr(places, "CHUNK", 2**10)
    monkeypatch.setattr(places, "SLAB", 2**12)
    return races

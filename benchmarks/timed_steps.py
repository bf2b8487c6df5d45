"""Steps of benchmarks/training.py: their seconds and memory, and where a run is, also if it is ended halfway."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from peft_longlora.memory.blocks import find_blocks

GIB = 2**30
EVERY = 20.0  # seconds between two lines of one step


class Progress:
    """Lines that say what a run does, and since when."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.calls = 0

    def tell(self, what: str) -> None:
        """Print `what` with the seconds since the start and the memory that is used now."""
        self.last = time.perf_counter()
        gpu = torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0
        print(f"[{self.last - self.start:6.1f} s, {gpu:5.1f} GiB, {host_peak():5.1f} in host] {what}", flush=True)

    def watch(self, model: nn.Module) -> None:
        """Say how far a long step is: which call of a block it has reached. Nothing waits for the GPU.

        A GPU's queue holds some thousand kernels, a few blocks at most, so the host is not far ahead of a long row.
        """
        for block in find_blocks(model):
            block.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1
        if time.perf_counter() - self.last > EVERY:
            self.tell(f"call {self.calls} of a block, second forwards included")


def host_peak() -> float:
    """GiB of the host's memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass(frozen=True)
class Timed:
    """One step: its seconds, GiB at its peak on the GPU, and whether it warmed up."""

    seconds: float
    peak_gib: float
    warms_up: bool


def timed_steps(
    step: Callable[[], None], device: str, warm_up: int, repeats: int, progress: Progress
) -> Iterator[Timed]:
    """Run the steps, and give each as soon as it is over.

    What made the model, and measured it, does not count for the peak.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for number in range(warm_up + repeats):
        synchronize()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        progress.calls = 0
        progress.tell(f"step {number + 1} of {warm_up + repeats} begins")
        start = time.perf_counter()
        step()
        synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else float("nan")
        progress.tell(f"step {number + 1} is over: {seconds:.3f} s, peak {peak:.1f} GiB")
        yield Timed(seconds, peak, number < warm_up)


def profile(step: Callable[[], None]) -> list[tuple[str, float]]:
    """Milliseconds of each kernel of one step, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    found = [(event.key, event.device_time_total / 1e3) for event in seen.key_averages()]
    return sorted(found, key=lambda pair: -pair[1])

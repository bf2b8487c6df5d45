"""How attention is timed: cases, inputs, medians of a step, replays of a CUDA graph. For the scripts beside it."""

import gc
import platform
import statistics
import time
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import transformers

from peft_longlora.kernels.groups import Groups, plan_groups, split_heads


@dataclass
class Case:
    name: str
    heads: int
    kv_heads: int
    dim: int
    tokens: int
    group: int
    documents: list[int] | None = None
    pattern: str = "s2"

    def plan(self, pattern: str) -> Groups:
        lengths = self.documents or [self.tokens]
        starts = accumulate(lengths, initial=0)
        documents = [(start, length, 1) for start, length in zip(starts, lengths, strict=False)]
        return plan_groups(1, self.tokens, self.group, pattern, documents=documents)

    def pairs(self, pattern: str) -> float:
        """Query-key pairs over all heads: the causal work."""
        plan = self.plan(pattern)
        straight, _ = split_heads(self.heads, self.kv_heads)
        halves = (plan.straight, straight), (plan.shifted, self.heads - straight)
        return sum(n * sum((b - a) * (b - a + 1) / 2 for a, b in pairwise(cuts)) for cuts, n in halves)

    @property
    def share(self) -> float:
        return self.pairs(self.pattern) / self.pairs("full")


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v as a projection gives them, (B, S, H, D) in memory, and the gradient of the output."""
    shapes = case.heads, case.kv_heads, case.kv_heads, case.heads
    q, k, v, dout = (torch.randn(1, case.tokens, h, case.dim, device=device, dtype=dtype) for h in shapes)
    return [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)], dout


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def measure(call, qkv: list[torch.Tensor], dout: torch.Tensor, seconds: float) -> dict[str, float]:
    """Medians of forward and of forward + backward in ms, the host's ms an iteration, and peak memory above inputs."""
    is_cuda = dout.is_cuda

    def step(mark=lambda: None):
        mark()
        out = call(*qkv)
        mark()
        torch.autograd.grad(out, qkv, dout)
        mark()

    step()
    gc.collect()
    before, peak = 0, 0
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    step()
    if is_cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    once = time.perf_counter() - start
    count = max(3, min(1000, int(seconds / once)))
    for _ in range(count):  # to the clock that lasts
        step()
    if is_cuda:
        events = []

        def mark():
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        start = time.perf_counter()
        for _ in range(count):
            step(mark)
        host = (time.perf_counter() - start) / count * 1e3
        torch.cuda.synchronize()
        times = [(a.elapsed_time(b), a.elapsed_time(c)) for a, b, c in zip(*[iter(events)] * 3, strict=True)]
    else:
        stamps = []
        for _ in range(count):
            step(lambda: stamps.append(time.perf_counter()))
        times = [((b - a) * 1e3, (c - a) * 1e3) for a, b, c in zip(*[iter(stamps)] * 3, strict=True)]
        host = 0.0
    forward, both = (statistics.median(x) for x in zip(*times, strict=True))
    return dict(forward_ms=forward, both_ms=both, host_ms=host, peak_mib=peak / 2**20)


def replay(call, qkv: list[torch.Tensor], dout: torch.Tensor, seconds: float) -> float:
    """Median ms of forward + backward replayed as one CUDA graph: the device's time without the host's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(call(*qkv), qkv, dout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        torch.autograd.grad(call(*qkv), qkv, dout)
    times = []
    stop = time.perf_counter() + 2 * seconds
    while time.perf_counter() < stop or len(times) < 6:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
        for event in events:
            event.record()
            graph.replay()
        torch.cuda.synchronize()
        times.extend(a.elapsed_time(b) for a, b in pairwise(events))
    return statistics.median(times[len(times) // 2 :])


def versions(device: torch.device) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("flash-attn-4", "flash-attn", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cudnn"] = str(torch.backends.cudnn.version())
    else:
        found["device"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return found

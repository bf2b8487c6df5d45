"""How fast steps were on GPUs, and how long another step would take: an estimate. Called by `longlora plan`.

Each rate is a row of benchmarks/results: the work of that step (`estimate.flops`, what was computed twice included) in
its seconds. Another step takes its own work at the same rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from statistics import median

from peft_longlora.memory.estimate import SHAPES, Shape, Training, estimate, flops
from peft_longlora.memory.plan import GIB, MemoryPlan


@dataclass(frozen=True)
class Rate:
    """A measured step.

    Attributes:
        gpu: as users write it.
        shape: name of the model's shape.
        length: tokens of the step.
        tokens_per_second: what was measured.
        free: blocks that were not checkpointed.
        keep: blocks that kept attention, in either memory.
        means: `offload` and `tile_tokens`, as `checkpoint_blocks` takes them.
        four_bit: whether the base was in NF4.
        group_size: tokens of a group.
    """

    gpu: str
    shape: str
    length: int
    tokens_per_second: float
    free: int
    keep: int
    means: tuple[tuple[str, int], ...] = ()
    four_bit: bool = False
    group_size: int = 8192

    @property
    def flops_per_second(self) -> float:
        """The work of the step, in its time."""
        shape, training = SHAPES[self.shape], Training(four_bit=self.four_bit)
        plan = estimate(shape, training, self.length, 10**6 * GIB, 10**6 * GIB, dict(self.means))
        plan = replace(plan, free=self.free, keep=self.keep, keep_in_host=0)
        return flops(shape, self.length, self.group_size, plan) * self.tokens_per_second / self.length


OFFLOADED = ("offload", True), ("tile_tokens", 4096)
EVERY_SECOND = ("offload", 2), ("tile_tokens", 4096)
EVERY_THIRD = ("offload", 3), ("tile_tokens", 4096)
# All with Liger's kernels and FlashAttention-4, optimiser step included (docs/performance.md).
MEASURED = (
    Rate("H100", "llama-2-7b", 32768, 14674, 17, 15),
    Rate("H100", "llama-2-7b", 65536, 11378, 0, 32, group_size=16384),
    Rate("H100", "llama-3.2-1b", 32768, 63144, 16, 0),
    Rate("H100", "llama-3.2-1b", 131072, 59121, 9, 7, OFFLOADED),
    Rate("H100", "llama-3.1-8b", 32768, 13219, 16, 16, OFFLOADED),
    Rate("H100", "llama-3.1-8b", 131072, 12053, 3, 29, OFFLOADED),
    Rate("H100", "llama-3.1-8b", 262144, 11864, 0, 30, OFFLOADED),
    Rate("H100", "llama-3.1-8b", 524288, 9742, 0, 9, EVERY_SECOND),
    Rate("H100", "llama-3.1-8b", 131072, 9738, 0, 0, OFFLOADED, four_bit=True),
    Rate("H100", "llama-3.3-70b", 131072, 1159, 0, 12, EVERY_SECOND, four_bit=True),
    Rate("H200", "llama-3.1-8b", 32768, 15365, 32, 0),
    Rate("H200", "llama-3.1-8b", 131072, 12814, 8, 24, OFFLOADED),
    Rate("H200", "llama-3.1-8b", 262144, 12289, 3, 26, OFFLOADED),
    Rate("H200", "llama-3.1-8b", 524288, 10045, 0, 20, EVERY_SECOND),
    Rate("H200", "llama-3.1-8b", 1048576, 8744, 0, 3, EVERY_THIRD),
)
NEAR = 4  # times a measured size, within which the rate is taken as it is


def check_gpu(gpu: str) -> None:
    """Refuse a GPU whose rate is not known.

    Raises:
        ValueError: no step was measured on it.
    """
    names = sorted({rate.gpu for rate in MEASURED})
    if gpu.lower() not in {name.lower() for name in names}:
        raise ValueError(
            f"gpu={gpu!r}: no step was measured on it. Use one of {', '.join(names)}, or give tokens_per_second=..., "
            f"which you have measured."
        )


def _rates(gpu: str, four_bit: bool) -> list[Rate]:
    """Those of a GPU and of such a base; if none of such a base was measured, all of the GPU."""
    check_gpu(gpu)
    rows = [rate for rate in MEASURED if rate.gpu.lower() == gpu.lower()]
    return [rate for rate in rows if rate.four_bit == four_bit] or rows


def unlike_measured(shape: Shape, length: int, group_size: int, gpu: str = "H100", four_bit: bool = False) -> list[str]:
    """In what a step is unlike all that were measured, in words; empty if the estimate of its seconds stands near them.

    A size is unlike if it is more than `NEAR` times the largest or less than a `NEAR`th of the smallest: narrow models
    and short rows do not fill a GPU, so their rate is lower.

    Args:
        shape: of the model.
        length: tokens of the step on one GPU.
        group_size: tokens of a group.
        gpu: a name in `MEASURED`, in any case.
        four_bit: whether the base is in NF4.

    Raises:
        ValueError: no step was measured on this GPU.
    """
    rows = _rates(gpu, four_bit)
    shapes = [SHAPES[rate.shape] for rate in rows]
    sizes = (
        ("a width of", shape.hidden, [each.hidden for each in shapes]),
        ("rows on one GPU of", length, [rate.length for rate in rows]),
        ("groups of", group_size, [rate.group_size for rate in rows]),
    )
    found = []
    for name, size, known in sizes:
        if not min(known) / NEAR <= size <= max(known) * NEAR:
            some = f"{min(known):,}" if min(known) == max(known) else f"{min(known):,} to {max(known):,}"
            found.append(f"{name} {size:,} ({some} measured)")
    if shape.experts > 1:
        found.append("experts")
    if four_bit and not any(rate.four_bit for rate in rows):
        found.append("a base in 4 bits")
    return found


def seconds(shape: Shape, plan: MemoryPlan, group_size: int, gpu: str = "H100", four_bit: bool = False) -> float:
    """Estimated seconds of a step on one GPU.

    Args:
        shape: of the model.
        plan: the step.
        group_size: tokens of a group; the row's length for full attention.
        gpu: a name in `MEASURED`, in any case.
        four_bit: whether the base is in NF4. If no such step was measured, the rates of bf16 are taken.

    Raises:
        ValueError: no step was measured on this GPU.
    """
    rows = _rates(gpu, four_bit)
    # Narrow models do not fill a GPU, so the rates are those of the widths nearest to the model's.
    apart = {rate: abs(log(SHAPES[rate.shape].hidden / shape.hidden)) for rate in rows}
    near = [rate for rate in rows if apart[rate] == min(apart.values())]
    return flops(shape, plan.length, group_size, plan) / median(rate.flops_per_second for rate in near)

"""`MemoryPlan`: the memory of a training step as a formula, and the fastest means with which a step fits.

A step's peak memory grows linearly with the row, because no kernel here makes an S x S matrix. `fit` measures the
numbers of the formula on a GPU, `estimate` computes them from a model's shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

GIB = 2**30
# What a checkpointed block computes a second time, as a share of its forward: all but the last product of its
# feed-forward layer, with and without attention. Only the order of plans and `work` follow from them.
AGAIN, AGAIN_KEPT = 0.86, 0.64
TILES, COPIES = 0.02, 0.01  # what tiles, and copies to the host, cost beside that, as a share of the forward
MORE_FORWARD = 0.5  # with offload=n, (n - 1) / 2 times as many blocks as there are run forward once more

# The share of a GPU's memory that a plan fills: the allocator loses some to fragments, and cuBLAS and NCCL need some.
# A limit of this process alone (`torch.cuda.set_per_process_memory_fraction`) counts the fragments too.
FILLED = 0.94
ESTIMATED_FILLED = 0.92  # if nothing was measured; measured peaks are up to 5% above their estimates
NAMED_FILLED = 0.97  # of a budget that the caller names, which no allocator holds to the byte
TILE = 4096  # tokens of a tile, if feed-forward layers of whole rows do not fit
HOST_FILLED = 0.75  # the share of the host's memory that may be used
# The means to try, from the fastest to the one that needs least memory; arguments of `checkpoint_blocks`.
MEANS: tuple[dict[str, Any], ...] = (
    dict(),
    dict(tile_tokens=TILE),
    dict(offload=True, tile_tokens=TILE),
    dict(offload=2, tile_tokens=TILE),
    dict(offload=3, tile_tokens=TILE),
)


def means_of(length: int) -> list[dict[str, Any]]:
    """`MEANS` for a row of `length` tokens: without tiles if a tile would hold the whole row."""
    found: list[dict[str, Any]] = []
    for means in MEANS:
        some = {name: value for name, value in means.items() if name != "tile_tokens" or value < length}
        if some not in found:
            found.append(some)
    return found


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a step of `length` tokens on one GPU, and the means that make it fit. Sizes are bytes.

    Attributes:
        length: tokens of a step.
        budget: bytes that may be used.
        fixed: weights, gradients, optimiser states, and everything else that does not grow with the row.
        token_bytes: a token's bytes at the peak (in a block's backward), if every block is checkpointed and none keeps
            attention.
        loss_bytes: a token's bytes when the loss is computed.
        free_bytes: a token's additional bytes then, for each block that keeps everything.
        kept_bytes: a token's bytes in the output of one block's attention.
        input_bytes: a token's bytes in a block's input.
        blocks: number of the model's blocks.
        free: how many of them are not checkpointed.
        keep: how many checkpointed blocks keep the output of attention.
        keep_in_host: how many more keep it in the host's memory.
        means: `offload` and `tile_tokens`, as `checkpoint_blocks` takes them.
        host_budget: bytes that may wait in the host's memory.
        parts: what `fixed` consists of, if that is known.
        token_parts: what `token_bytes` consists of, if that is known.
        late: bytes of the embeddings' gradient, and of what adds it to another. They are made when the blocks' backward
            is over, and are not in `fixed`.
        kernels: libraries whose kernels the model uses; for the table.
        loss_fixed: bytes of the loss that do not grow with the row and are not in `fixed`: what makes the gradient of a
            trained output layer, as that of tied embeddings.
        turn_bytes: a token's bytes, without `free_bytes`, when the backward of the first block that keeps everything
            runs; 0 if `loss_bytes` covers it.
        tiled_fixed: bytes of a tile, which do not grow with the row and are not in `fixed`; 0 without tiles.
        tiled_bytes: a token's bytes while a tile is computed; 0 if `token_bytes` covers them.
    """

    length: int
    budget: int
    fixed: int
    token_bytes: float
    loss_bytes: float
    free_bytes: float
    kept_bytes: float
    input_bytes: float
    blocks: int
    free: int = 0
    keep: int = 0
    keep_in_host: int = 0
    means: dict[str, Any] = field(default_factory=dict)
    host_budget: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    token_parts: dict[str, float] = field(default_factory=dict)
    late: int = 0
    kernels: tuple[str, ...] = ()
    loss_fixed: int = 0
    turn_bytes: float = 0.0
    tiled_fixed: int = 0
    tiled_bytes: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `checkpoint_blocks`."""
        return dict(free=self.free, keep=self.keep, keep_in_host=self.keep_in_host, **self.means)

    @property
    def fits(self) -> bool:
        """Whether the step fits into the GPU and the host."""
        return self.peak <= self.budget and self.host <= self.host_budget

    @property
    def arriving(self) -> float:
        """A token's bytes in the output of attention that comes back from the host while a block's backward runs."""
        # The next block's, while this block's is used. Blocks that keep theirs on the GPU come first in the backward.
        return self.kept_bytes if self.keep_in_host and not self.keep else 0.0

    @property
    def in_block(self) -> float:
        """Bytes in the backward of a block that is computed again, that are not in `fixed`."""
        in_tile = self.tiled_fixed + self.length * self.tiled_bytes
        return max(self.length * self.token_bytes, in_tile) + self.length * self.arriving

    @property
    def growing(self) -> float:
        """Bytes at the expected peak that are not in `fixed` and `late`, but for what blocks keep of attention."""
        free = self.free * self.free_bytes
        at_loss = self.loss_fixed + self.length * (self.loss_bytes + free)
        in_turn = self.length * (self.turn_bytes + free) if self.free else 0.0
        return max(self.in_block, at_loss, in_turn)

    @property
    def peak(self) -> int:
        """The expected peak on the GPU."""
        return max(self.in_blocks, round(self.fixed + self.late))

    @property
    def in_blocks(self) -> int:
        """The expected peak while blocks and loss are computed, before the embeddings' gradient is made."""
        return round(self.fixed + self.growing + self.length * self.keep * self.kept_bytes)

    @property
    def host(self) -> int:
        """Bytes that wait in the host's memory."""
        offload = int(self.means.get("offload", 0))
        inputs = -(-(self.blocks - self.free) // offload) if offload else 0
        return round(self.length * (inputs * self.input_bytes + self.keep_in_host * self.kept_bytes))

    @property
    def work(self) -> float:
        """What is computed a second time, in forwards of the model. Only for comparisons of plans."""
        kept = self.keep + self.keep_in_host
        again = AGAIN_KEPT * kept + AGAIN * (self.blocks - self.free - kept)
        again += MORE_FORWARD * max(0, int(self.means.get("offload", 0)) - 1) * (self.blocks - self.free)
        again += COPIES * (self.blocks - self.free) if self.means.get("offload") else 0.0
        again += TILES * (self.blocks - self.free) if self.means.get("tile_tokens") else 0.0
        return again / self.blocks

    @property
    def longest(self) -> int:
        """The tokens of the longest step that fits with `offload` and `tile_tokens` of this plan."""
        on_gpu = (self.budget - self.fixed) / self.token_bytes if self.fixed + self.late <= self.budget else 0
        for fixed, growing in ((self.loss_fixed, self.loss_bytes), (self.tiled_fixed, self.tiled_bytes)):
            if growing:
                on_gpu = min(on_gpu, (self.budget - self.fixed - fixed) / growing)
        offload = int(self.means.get("offload", 0))
        in_host = self.host_budget / (-(-self.blocks // offload) * self.input_bytes) if offload else on_gpu
        return max(0, int(min(on_gpu, in_host)))

    def _beside_blocks(self) -> list[tuple[str, int]]:
        """What the peak has beyond `token_bytes`, by name."""
        more, free = round(self.growing - self.length * self.token_bytes), f"{self.free} blocks that keep everything"
        if self.growing > self.in_block:
            return [(f"more for {free}" if self.free else "more while the loss is computed", more)]
        arriving = round(self.length * self.arriving)
        rows = [("attention's output on its way back from the host", arriving)] if arriving else []
        rows += [("more for a tile of a feed-forward layer", more - arriving)] if more > arriving else []
        return rows or [(f"more for {free}", 0)]

    def __str__(self) -> str:
        parts = self.parts or {"weights, gradients, optimiser": self.fixed}
        growing = self.token_parts or {"inputs of blocks and the working set of one": self.token_bytes}
        kept = f"{self.keep} blocks keep attention's output"
        rows = [
            *parts.items(),
            *((name, round(self.length * size)) for name, size in growing.items()),
            *self._beside_blocks(),
            (kept, round(self.length * self.keep * self.kept_bytes)),
            *([("the embeddings' gradient, when these are gone", self.late)] if self.late else []),
            ("peak expected", self.peak),
            ("budget", self.budget),
            (f"in the host's memory ({self.keep_in_host} blocks' attention)", self.host),
        ]
        means = ", ".join(f"{name}={value}" for name, value in self.options.items())
        title = f"a step of {self.length} tokens, {self.blocks} blocks; kernels of {', '.join(self.kernels) or 'torch'}"
        lines = [f"{name:56s} {size / GIB:8.2f} GiB" for name, size in rows]
        return "\n".join([title, *lines, f"checkpoint_blocks(model, {means})"])


def fill(plan: MemoryPlan) -> MemoryPlan:
    """The same `means`, with the numbers of blocks that compute least a second time; the plan itself if none fit."""
    found = []
    for free in range(plan.blocks + 1):
        one = replace(plan, free=free, keep=0, keep_in_host=0)
        if one.fits:
            kept, rest = max(1.0, plan.length * plan.kept_bytes), plan.blocks - free  # bytes of a block's attention
            keep = min(rest, int((one.budget - one.in_blocks) / kept))
            found.append(replace(one, keep=keep))
            in_host = min(rest, int((one.host_budget - one.host) / kept)) if plan.means.get("offload") else 0
            # One on the GPU, if it takes no more room than what arrives for blocks whose attention waits; or none.
            for first in {0, min(1, rest - in_host)} if in_host else ():
                if (with_host := replace(one, keep=first, keep_in_host=in_host)).fits:
                    keep = min(rest - in_host, first + int((with_host.budget - with_host.in_blocks) / kept))
                    found.append(replace(with_host, keep=keep))
    return min(found, key=lambda one: one.work, default=plan)

"""`fit_memory`: the fastest way to compute a step that fits into a GPU. It measures a few short steps and extrapolates.

A step's peak memory grows linearly with the row, because no kernel here makes an S x S matrix. So short steps predict
the peak of a long step, with any kernels, quantisation and loss. The row is doubled until the growth is steady, because
the peak of a very short step is the embeddings' gradient. Two more steps, in which some blocks keep everything, show
what a block costs. Nothing is assumed about the architecture.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import schedule_of
from peft_longlora.memory.blocks import checkpoint_blocks, find_blocks

logger = logging.get_logger(__name__)

# Computes the loss of a step, from a model and ids (1, S).
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]

# The share of a GPU's memory that a plan fills: the allocator loses some to fragments, and cuBLAS and NCCL need some.
FILLED = 0.94
SHORTEST = 2048  # tokens of the first step that is measured
STEADY = 0.05  # two slopes that differ by less count as equal
FREE_PROBES = (4, 8)  # blocks that keep everything in two more steps
ADAM_BYTES = 8  # two float32 moments for each trained number
TILE = 4096  # tokens of a tile, if a whole row's feed-forward layers do not fit
HOST_FILLED = 0.75  # the share of the host's memory that inputs of blocks may use
# The means to try, from the fastest to the one that needs least memory; arguments of `checkpoint_blocks`.
MEANS: tuple[dict[str, Any], ...] = (
    dict(keep=True),
    dict(keep=False),
    dict(keep=False, offload=True),
    dict(keep=False, offload=True, tile_tokens=TILE),
    dict(keep=False, offload=2, tile_tokens=TILE),
)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a step of `length` tokens, and the means that were switched on. Sizes are bytes.

    Attributes:
        length: tokens of a step.
        budget: bytes that may be used.
        fixed: weights, gradients, optimiser states, and everything else that does not grow with the row.
        a_token: a token's bytes at the peak, with every block checkpointed; the peak is in a block's backward.
        a_loss: a token's bytes when the loss is computed, without those of blocks that keep everything.
        a_block: a token's additional bytes then, for each block that keeps everything.
        blocks: number of the model's blocks.
        free: how many of them are not checkpointed.
        means: the arguments of `checkpoint_blocks` for the others.
        host: bytes that wait in the host's memory.
        host_budget: bytes that may wait there.
    """

    length: int
    budget: int
    fixed: int
    a_token: float
    a_loss: float
    a_block: float
    blocks: int
    free: int = 0
    means: dict[str, Any] = field(default_factory=dict)
    host: int = 0
    host_budget: int = 0

    @property
    def fits(self) -> bool:
        """Whether the step fits into the GPU and the host."""
        return self.peak <= self.budget and self.host <= self.host_budget

    @property
    def peak(self) -> int:
        """The expected peak."""
        at_loss = self.a_loss + self.free * self.a_block if self.free else 0.0
        return round(self.fixed + self.length * max(self.a_token, at_loss))

    @property
    def longest(self) -> int:
        """The tokens of the longest step that fits with these means and every block checkpointed."""
        return max(0, int((self.budget - self.fixed) / self.a_token))

    def __str__(self) -> str:
        rows = [
            ("budget", self.budget),
            ("weights, gradients, optimiser", self.fixed),
            (f"{self.length} tokens, every block checkpointed", round(self.length * self.a_token)),
            (f"{self.free} of {self.blocks} blocks not checkpointed: peak expected", self.peak),
            ("in the host's memory", self.host),
        ]
        means = ", ".join(f"{name}={value}" for name, value in self.means.items())
        lines = [f"{name:56s} {size / 2**30:8.2f} GiB" for name, size in rows]
        return "\n".join([*lines, f"checkpoint_blocks(free={self.free}, {means})"])


def choose(plan: MemoryPlan) -> MemoryPlan:
    """The same plan with the most free blocks that fit: they need no second forward."""
    fitting = (replace(plan, free=free) for free in range(plan.blocks, 0, -1))
    return next((one for one in fitting if one.peak <= plan.budget), plan)


def fit_memory(
    model: nn.Module,
    length: int,
    budget: int | None = None,
    *,
    loss: Loss | None = None,
) -> MemoryPlan:
    """Choose the fastest way to compute a step of `length` tokens that fits on this GPU.

    If memory is left with every block checkpointed, some blocks keep everything. If memory is short, blocks first
    compute attention twice, then their inputs wait in the host's memory, then feed-forward layers work by tiles. Give
    the Trainer gradient_checkpointing=False; otherwise it would checkpoint all blocks again.

    Args:
        model: a model of transformers with its adapter, on its GPU, ready to train with AdamW.
        length: tokens of a step on this GPU: rows times their length.
        budget: bytes that may be used. None: 94% of the GPU's memory, minus the memory of other programs.
        loss: computes the loss of the training, from the model and ids (1, S). None: the model's own loss; its logits,
            (1, S, V) float32, are then a part of the plan.

    Returns: the plan that is now in use; it is also logged.

    Raises:
        ValueError: the model is not on a CUDA device, or has no blocks to checkpoint.
        MemoryError: no means suffice; the message says which length fits. All blocks are then checkpointed.
    """
    device = next(model.parameters()).device
    _check(device, length)
    loss = loss or (lambda model, ids: model(input_ids=ids, labels=ids).loss)
    if budget is None:
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        budget = int(total * FILLED) - others
    plan = None
    for means in MEANS:
        try:
            plan = _measure(model, length, budget, loss, means)
        except torch.OutOfMemoryError:  # even a short step ran out of memory
            logger.info(f"fit_memory: a short step with {means} ran out of memory.")
            continue
        if plan.fits:
            checkpoint_blocks(model, free=plan.free, **means)
            logger.info(f"fit_memory:\n{plan}")
            return plan
    checkpoint_blocks(model, keep=False)
    if plan is None:
        raise MemoryError(
            f"Not even a step of some {SHORTEST} tokens fits into memory. Use a 4-bit base, or shard the model over "
            f"more GPUs."
        )
    raise MemoryError(
        f"A step of {length} tokens needs {plan.peak / 2**30:.1f} GiB with the means that need least memory, "
        f"{plan.means}; the budget is {plan.budget / 2**30:.1f} GiB, and {plan.longest} tokens fit. The step puts "
        f"{plan.host / 2**30:.1f} GiB into the host's memory, of which {plan.host_budget / 2**30:.1f} GiB may be used. "
        f"Use shorter rows, a 4-bit base, sequence parallelism over more GPUs, or a loss that makes no logits of the "
        f"whole row."
    )


def _check(device: torch.device, length: int) -> None:
    if device.type != "cuda":
        raise ValueError(f"The model is on {device.type!r}: fit_memory measures on a GPU. Move the model to one.")
    if length < 2 * SHORTEST:
        raise ValueError(f"length={length} is below {2 * SHORTEST} tokens: such a short step needs no plan.")


def _measure(model: nn.Module, length: int, budget: int, loss: Loss, means: dict[str, Any]) -> MemoryPlan:
    """The plan with these means, from a few short steps."""
    checkpoint_blocks(model, **means)
    blocks = len(find_blocks(model))
    tokens, peak, a_token = _growth(model, length, loss)
    bare = peak - tokens * a_token
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fixed = round(bare) + ADAM_BYTES * trained
    offload = int(means.get("offload", 0))
    host = length * _input_bytes(model) * -(-blocks // offload) if offload else 0
    room = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * HOST_FILLED)
    plan = MemoryPlan(length, budget, fixed, a_token, 0.0, 0.0, blocks, 0, means, host, room)
    if plan.fits and not offload:  # memory is left over
        some, more = min(FREE_PROBES[0], blocks // 2), min(FREE_PROBES[1], blocks)
        with_some, with_more = (_with_free(model, free, tokens, loss, means) for free in (some, more))
        a_block = (with_more - with_some) / (more - some) / tokens
        a_loss = (with_some - bare) / tokens - some * a_block
        plan = choose(replace(plan, a_loss=a_loss, a_block=a_block))
    return plan


def _input_bytes(model: nn.Module) -> int:
    """A token's bytes in the input of a block."""
    return model.config.get_text_config().hidden_size * 2


def _growth(model: nn.Module, length: int, loss: Loss) -> tuple[int, int, float]:
    """A number of tokens above which the peak grows steadily, the peak there, and a token's bytes."""
    # A block's backward holds its input, queries, keys, values and gradients; smaller growth belongs to other parts.
    least = 6 * _input_bytes(model)
    tokens, slope = SHORTEST, 0.0
    _peak(model, tokens, loss)  # compiles kernels
    peak = _peak(model, tokens, loss)
    while 4 * tokens <= length or not slope:
        longer = _peak(model, 2 * tokens, loss)
        before, slope = slope, (longer - peak) / tokens
        tokens, peak = 2 * tokens, longer
        if slope >= least and abs(slope - before) < STEADY * slope:
            break
    return tokens, peak, slope


def _with_free(model: nn.Module, free: int, tokens: int, loss: Loss, means: dict[str, Any]) -> int:
    """`_peak` with some free blocks; if they do not fit, a number above the GPU's memory."""
    checkpoint_blocks(model, free=free, **means)
    try:
        return _peak(model, tokens, loss)
    except torch.OutOfMemoryError:
        return torch.cuda.mem_get_info(next(model.parameters()).device)[1]
    finally:
        checkpoint_blocks(model, **means)


def _peak(model: nn.Module, tokens: int, loss: Loss) -> int:
    """Bytes at the peak of a forward and a backward, with gradients. Model and random state are not changed."""
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
    schedules = {id(one): one for one in map(schedule_of, find_attention_modules(model).values()) if one is not None}
    counts = {key: one.training_forwards for key, one in schedules.items()}
    try:
        with torch.random.fork_rng(devices=[device]):
            ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, tokens), device=device)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            loss(model, ids).backward()
            torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        for key, one in schedules.items():  # `dense_every` must count only the training's forwards
            one.training_forwards = counts[key]

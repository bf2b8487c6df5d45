"""`fit_memory`: as much speed as a GPU's memory has room for. It measures a few short steps and extrapolates.

A step's peak memory grows linearly with the row, because no kernel here makes an S x S matrix. So short steps tell the
peak of a long one, with whatever kernels, quantisation and loss it has: the row is doubled until the growth is steady,
because the peak of a very short step is that of the embeddings' gradient. Two more steps, with some blocks that keep
everything, tell what a block costs. Nothing is assumed of the architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.utils import logging

from peft_longlora.memory.blocks import checkpoint_blocks, find_blocks

logger = logging.get_logger(__name__)

# From a model and ids, (1, S), what a step calls `backward` on.
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]

# Of a GPU's memory that a plan fills: the allocator loses some to fragments, and cuBLAS and NCCL take theirs.
FILLED = 0.94
SHORTEST = 2048  # tokens of the first step that is measured
STEADY = 0.05  # two slopes that differ by less are one
FREE_PROBES = (4, 8)  # blocks that keep everything in two more steps
ADAM_BYTES = 8  # two float32 moments a trained number


@dataclass(frozen=True)
class MemoryPlan:
    """What a step of `length` tokens needs, and what was switched on. Sizes are bytes.

    Attributes:
        length: tokens of a step.
        budget: bytes that may be used.
        fixed: weights, gradients, optimiser states, and what else does not grow with the row.
        a_token: a token's bytes at the peak, with every block checkpointed; the peak is in a block's backward.
        a_loss: a token's bytes when the loss is computed, less those of blocks that keep everything.
        a_block: a token's bytes more then for each block that keeps everything.
        blocks: number of the model's blocks. free: how many of them are not checkpointed.
    """

    length: int
    budget: int
    fixed: int
    a_token: float
    a_loss: float
    a_block: float
    blocks: int
    free: int = 0

    @property
    def peak(self) -> int:
        """The peak that is expected."""
        return round(self.fixed + self.length * max(self.a_token, self.a_loss + self.free * self.a_block))

    @property
    def longest(self) -> int:
        """Tokens of the longest step that fits with every block checkpointed."""
        return int((self.budget - self.fixed) / self.a_token)

    def __str__(self) -> str:
        rows = [
            ("budget", self.budget),
            ("weights, gradients, optimiser", self.fixed),
            (f"{self.length} tokens, every block checkpointed", round(self.length * self.a_token)),
            (f"{self.free} of {self.blocks} blocks not checkpointed: peak expected", self.peak),
        ]
        return "\n".join(f"{name:56s} {size / 2**30:8.2f} GiB" for name, size in rows)


def choose(plan: MemoryPlan) -> MemoryPlan:
    """The same plan with the most free blocks that fit: they need no second forward.

    Raises: MemoryError: not even a step with every block checkpointed fits; the message says which length does.
    """
    if plan.peak > plan.budget:
        raise MemoryError(
            f"A step of {plan.length} tokens needs {plan.peak / 2**30:.1f} GiB with every block checkpointed, and the "
            f"budget is {plan.budget / 2**30:.1f} GiB. {max(plan.longest, 0)} tokens fit. Use shorter rows, a 4-bit "
            f"base, sequence parallelism over more GPUs, or a loss that makes no logits of the whole row."
        )
    fitting = (replace(plan, free=free) for free in range(plan.blocks, 0, -1))
    return next((one for one in fitting if one.peak <= plan.budget), plan)


def fit_memory(
    model: nn.Module,
    length: int,
    budget: int | None = None,
    *,
    loss: Loss | None = None,
) -> MemoryPlan:
    """Choose how many blocks are checkpointed, so that a step of `length` tokens fills the GPU and no more.

    Checkpointed blocks keep the outputs of attention (`keep_attention`). Give the Trainer gradient_checkpointing=False:
    it would switch all blocks on again.

    Args:
        model: a model of transformers with its adapter, on its GPU, ready to train with AdamW.
        length: tokens of a step on this GPU: rows times their length.
        budget: bytes that may be used. None: 94% of what the GPU has, less what other programs hold.
        loss: how the training computes its loss, from the model and ids (1, S). None: the model's own way, whose
            logits, (1, S, V) float32, are then a part of the plan.

    Returns: the plan that is now in force; it is also logged.

    Raises:
        ValueError: the model is not on a CUDA device, or has no blocks to checkpoint.
        MemoryError: not even a step with every block checkpointed fits. All blocks are then checkpointed.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"The model is on {device.type!r}: fit_memory measures on the GPU that is to be filled.")
    if length < 2 * SHORTEST:
        raise ValueError(f"length={length} is below {2 * SHORTEST} tokens: a step so short needs no plan.")
    loss = loss or (lambda model, ids: model(input_ids=ids, labels=ids).loss)
    if budget is None:
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        budget = int(total * FILLED) - others
    blocks = len(find_blocks(model))
    checkpoint_blocks(model)
    try:
        tokens, peak, a_token = _growth(model, length, loss)
        some, more = (min(free, blocks) for free in FREE_PROBES)
        with_some, with_more = (_with_free(model, free, tokens, loss) for free in (some, more))
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"fit_memory measures steps of {SHORTEST} to {length // 2} tokens to plan for {length}, and one ran "
            f"out of memory. Use shorter rows, a 4-bit base, or a loss that makes no logits of the whole row. ({error})"
        ) from error
    bare = peak - tokens * a_token
    a_block = (with_more - with_some) / max(1, more - some) / tokens
    a_loss = (with_some - bare) / tokens - some * a_block
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fixed = round(bare) + ADAM_BYTES * trained
    plan = choose(MemoryPlan(length, budget, fixed, a_token, a_loss, a_block, blocks))
    checkpoint_blocks(model, free=plan.free)
    logger.info(f"fit_memory:\n{plan}")
    return plan


def _growth(model: nn.Module, length: int, loss: Loss) -> tuple[int, int, float]:
    """A number of tokens from which on the peak grows steadily, the peak there, and a token's bytes."""
    # A checkpointed block keeps its input at least; growth below that is no growth of the blocks.
    least = len(find_blocks(model)) * model.config.get_text_config().hidden_size * 2
    tokens, slope = SHORTEST, 0.0
    _peak(model, tokens, loss)  # kernels are compiled
    peak = _peak(model, tokens, loss)
    while 4 * tokens <= length or not slope:
        longer = _peak(model, 2 * tokens, loss)
        before, slope = slope, (longer - peak) / tokens
        tokens, peak = 2 * tokens, longer
        if slope >= least and abs(slope - before) < STEADY * slope:
            break
    return tokens, peak, slope


def _with_free(model: nn.Module, free: int, tokens: int, loss: Loss) -> int:
    """`_peak` with some free blocks."""
    checkpoint_blocks(model, free=free)
    try:
        return _peak(model, tokens, loss)
    finally:
        checkpoint_blocks(model)


def _peak(model: nn.Module, tokens: int, loss: Loss) -> int:
    """Bytes at the peak of a forward and a backward, gradients included. The model and the random numbers stay."""
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
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

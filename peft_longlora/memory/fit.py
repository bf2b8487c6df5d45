"""`fit_memory`: the fastest way to compute a step that fits into a GPU. It measures a few short steps and extrapolates.

Short steps predict the peak of a long step (`plan`), with any kernels, quantisation and loss. What the loss, the
blocks, a tile and the embeddings' gradient need is read apart (`peaks`): of a short step one would hide what another
needs in a long step. The row is doubled until the blocks' growth is steady. More steps, in which some blocks keep
everything or attention's output, show what a block costs. Nothing is assumed about the architecture.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging

from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of
from peft_longlora.memory.blocks import checkpoint_blocks, find_blocks
from peft_longlora.memory.fragments import advice
from peft_longlora.memory.host import host_budget
from peft_longlora.memory.liger import kernels_of, use_liger
from peft_longlora.memory.offload import Offload
from peft_longlora.memory.peaks import Loss, Peaks, measure_peaks
from peft_longlora.memory.plan import AGAIN_KEPT, FILLED, NAMED_FILLED, MemoryPlan, fill, means_of

logger = logging.get_logger(__name__)

SHORTEST = 2048  # tokens of the first step that is measured
STEADY = 0.05  # two slopes that differ by less count as equal
FREE_PROBES = (4, 8)  # blocks that keep everything in two more steps
SMALLER = 8  # times smaller tiles while the rest of a block is measured
MOMENTS = 2  # of AdamW, in the precision of what is trained


def fit_memory(
    model: nn.Module,
    length: int,
    budget: int | None = None,
    *,
    loss: Loss | None = None,
    liger: bool = True,
    accumulates: bool = False,
) -> MemoryPlan:
    """Choose the fastest way to compute a step of `length` tokens that fits on this GPU.

    If memory is left with every block checkpointed, blocks keep the output of attention, then everything. If memory is
    short, feed-forward layers work by tiles, then the inputs of blocks (and attention's outputs, if the host has room)
    wait in the host's memory. Give the Trainer gradient_checkpointing=False; otherwise it would checkpoint all blocks
    again. With several GPUs call it on every rank, before the model is wrapped by DDP or FSDP2 and before ranks share a
    sequence; `length` is then the tokens of one rank. Ranks that are connected take the plan of the first.

    Args:
        model: a model of transformers with its adapter, on its GPU, ready to train with AdamW. It counts as fused, as
            the Trainer's is; torch's default copies all that is trained once more, in its step.
        length: tokens of a step on this GPU: rows times their length.
        budget: bytes that may be used. The plan fills 97% of them, because a peak may be some percent higher than
            expected. None: 94% of the GPU's memory, minus the memory of other programs.
        loss: computes the loss of the training, from the model and ids (1, S). None: `own_loss`; the logits,
            (1, S, V) float32, are then a part of the plan if Liger is missing.
        liger: whether Liger's kernels are switched on if Liger is installed and knows the model; with the model's own
            loss also its fused loss. TRL's trainers bring a fused loss of their own. Liger's RoPE then serves every
            model of this family in the process, which must all be on a GPU.
        accumulates: whether gradients of several batches are summed before a step of the optimiser. Then they are on
            the GPU all the time. DDP's buckets, as large again, are counted where ranks are connected.

    Returns: the plan that is now in use; it is also logged.

    Raises:
        ValueError: the model is not on a CUDA device, or on several, has no blocks to checkpoint, or is wrapped or
            shared already.
        MemoryError: no means suffice; the message says which length fits. All blocks are then checkpointed.
    """
    device = next(model.parameters()).device
    _check(model, device, length)
    if liger:
        use_liger(model, fused_loss=loss is None)
    loss = loss or own_loss
    budget = _budget(device) if budget is None else int(budget * NAMED_FILLED)
    best = last = None
    for means in means_of(length):
        if best is not None and (means.get("offload", 0) > 1 or (best.work <= AGAIN_KEPT and not means.get("offload"))):
            continue  # nothing is gained
        try:
            last = _measure(model, length, budget, loss, means, accumulates)
        except torch.OutOfMemoryError:  # even a short step ran out of memory
            logger.info(f"fit_memory: a short step with {means} ran out of memory.")
            continue
        if last.fits and (best is None or last.work < best.work):
            best = last
    torch.cuda.empty_cache()  # what the steps have left, of other sizes than the training's, would be fragments
    best, last = _of_first_rank(best, last)
    if best is not None:
        checkpoint_blocks(model, **best.options)
        logger.info("\n".join(["fit_memory:", str(best), advice()]).rstrip())
        return best
    checkpoint_blocks(model, keep=False)
    if last is None:
        raise MemoryError(
            f"Not even a step of some {SHORTEST} tokens fits into memory. Use a 4-bit base, or shard the model over "
            f"more GPUs."
        )
    raise MemoryError(
        f"A step of {length} tokens needs {last.peak / 2**30:.1f} GiB with the means that need least memory, "
        f"{last.means}; the budget is {last.budget / 2**30:.1f} GiB, and {last.longest} tokens fit. The step puts "
        f"{last.host / 2**30:.1f} GiB into the host's memory, of which {last.host_budget / 2**30:.1f} GiB may be used. "
        f"Use shorter rows, a 4-bit base, sequence parallelism over more GPUs, or a loss that makes no logits of the "
        f"whole row."
    )


def own_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The model's own loss of ids (1, S), under the caller's autocast.

    A trained output layer of a half-precision base is kept in float32. Then it is under autocast in any case, as with
    the Trainer's bf16=True: a fused loss makes its gradient in float32 there, and in half the bytes without.
    """
    kind, head = ids.device.type, model.get_output_embeddings()
    is_kept = model.dtype.itemsize == 2 and head is not None and head.weight.dtype == torch.float32
    is_on = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_on else model.dtype
    with torch.autocast(kind, dtype) if is_on or is_kept else nullcontext():
        return model(input_ids=ids, labels=ids).loss


def _check(model: nn.Module, device: torch.device, length: int) -> None:
    if device.type != "cuda":
        raise ValueError(f"The model is on {device.type!r}: fit_memory measures on a GPU. Move the model to one.")
    if len(places := sorted({str(each.device) for each in model.parameters()})) > 1:
        raise ValueError(
            f"The model is on {', '.join(places)}: fit_memory measures one GPU. Load the model on one (without "
            f"device_map), or give checkpoint_blocks the switches yourself."
        )
    if length < 2 * SHORTEST:
        raise ValueError(f"length={length} is below {2 * SHORTEST} tokens: such a short step needs no plan.")
    check_alone(model)


def check_alone(model: nn.Module) -> None:
    """Refuse a model whose steps need other ranks: they might measure different numbers of steps, and wait forever.

    Args:
        model: the model that is to be measured.

    Raises:
        ValueError: it is wrapped by DDP or FSDP2, or its ranks share sequences.
    """
    names = {type(module).__name__ for module in model.modules()}
    wrappers = {"DistributedDataParallel", "DataParallel"}
    if wrappers & names or any(name.startswith(("FSDP", "FullySharded")) for name in names):
        raise ValueError(
            "The model is wrapped by DDP or FSDP. Call fit_memory before it is wrapped (before the Trainer trains), or "
            "take the switches of `longlora plan --gpus N` and give them to checkpoint_blocks."
        )
    settings = [settings_of(module) for module in find_attention_modules(model).values()]
    if any(one is not None and one.sharing is not None for one in settings):
        raise ValueError("Ranks share this model's sequences. Call fit_memory before parallelize_sequence.")


def _is_connected() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _of_first_rank(*plans: MemoryPlan | None) -> tuple[MemoryPlan | None, ...]:
    """The plans of rank 0, on every rank, so that all compute the same second time."""
    if not _is_connected():
        return plans
    shared = list(plans)
    dist.broadcast_object_list(shared)
    return tuple(shared)


def _budget(device: torch.device) -> int:
    """What this process may use: a share of the GPU's memory or of its own limit, minus what other programs use."""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    own = torch.cuda.get_per_process_memory_fraction(device)
    return int(min(total * FILLED - others, total * own * FILLED))


def _measure(
    model: nn.Module, length: int, budget: int, loss: Loss, means: dict[str, Any], accumulates: bool
) -> MemoryPlan:
    """The plan with these means, from a few short steps."""
    tile, blocks = means.get("tile_tokens"), len(find_blocks(model))
    # A tile needs the same in rows of any length. In a short row that would hide what attention needs in a long one.
    probe = dict(means, tile_tokens=max(1, tile // SMALLER)) if tile else means
    checkpoint_blocks(model, keep=False, **probe)
    # No row longer than the step's own: it may not fit where the step does. And a short step is measured as it is.
    shortest = max(SHORTEST, min(2 * (tile or 0), -(-length // 2)))
    tokens, peaks, token_bytes, loss_bytes = _growth(model, length, loss, shortest)
    bare = peaks.blocks - tokens * token_bytes
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    # DDP's buckets are not views of the gradients, unless it is told so.
    fixed = round(bare) + (MOMENTS + bool(accumulates) + _is_connected()) * trained
    in_host = _bytes_in_host(model, tokens, int(means.get("offload", 0)))
    plan = MemoryPlan(length, budget, fixed, token_bytes, loss_bytes, 0.0, 0.0, in_host, blocks, means=means)
    late = max(0, round(measure_peaks(model, SHORTEST, loss).end - bare))
    loss_fixed = max(0, round(peaks.loss - tokens * loss_bytes - bare))
    plan = replace(plan, host_budget=host_budget(), kernels=kernels_of(model), late=late, loss_fixed=loss_fixed)
    if tile:
        checkpoint_blocks(model, keep=False, **means)
        half, peaks = (measure_peaks(model, each, loss) for each in (tokens // 2, tokens))
        tiled_bytes = (peaks.blocks - half.blocks) / (tokens - tokens // 2)
        tiled_fixed = max(0, round(peaks.blocks - tokens * tiled_bytes - bare))
        plan = replace(plan, tiled_bytes=tiled_bytes, tiled_fixed=tiled_fixed)
    if plan.peak > budget:
        return plan
    with_attention = _with(model, tokens, loss, dict(means, keep=True))
    some, more = min(FREE_PROBES[0], blocks // 2), min(FREE_PROBES[1], blocks)
    with_some, with_more = (_with(model, tokens, loss, dict(means, keep=False, free=free)) for free in (some, more))
    checkpoint_blocks(model, keep=False, **means)
    free_bytes = (with_more.loss - with_some.loss) / (more - some) / tokens
    # Of the step with more such blocks: with few, or none, the peak may be in a tile of the others.
    turn_bytes = (with_more.blocks - bare) / tokens - more * free_bytes
    # Where the loss is computed, all are there. In a block's backward its own would be in either step.
    kept_bytes = (with_attention.loss - peaks.loss) / blocks / tokens
    return fill(replace(plan, turn_bytes=turn_bytes, free_bytes=free_bytes, kept_bytes=kept_bytes))


def _bytes_of_input(model: nn.Module) -> float:
    """A token's bytes in the input of a block."""
    return model.config.get_text_config().hidden_size * 2


def _bytes_in_host(model: nn.Module, tokens: int, every: int) -> float:
    """A token's bytes in the host's memory for each block whose input waits there, as the last steps had them.

    More than its input waits where a block is given other tensors too (Zamba, Gemma 4), and where a block's input is
    not what the block before gave, so that each waits in place of every n-th.
    """
    found = [getattr(block, "_gradient_checkpointing_func", None) for block in find_blocks(model)]
    hosts = {id(one.host): one.host.most for one in found if isinstance(one, Offload)}
    most = sum(hosts.values()) / tokens / -(-len(found) // max(1, every))
    return max(most, _bytes_of_input(model))


def _growth(model: nn.Module, length: int, loss: Loss, shortest: int = SHORTEST) -> tuple[int, Peaks, float, float]:
    """A number of tokens above which the blocks' peak grows steadily, the peaks there, and a token's bytes in the
    blocks and when the loss is computed."""
    # A block's backward holds its input, queries, keys, values and gradients; smaller growth belongs to other parts.
    least = 6 * _bytes_of_input(model)
    tokens, slope, at_loss = shortest, 0.0, 0.0
    measure_peaks(model, tokens, loss)  # compiles kernels
    peaks = measure_peaks(model, tokens, loss)
    while 4 * tokens <= length or not slope:
        longer = measure_peaks(model, 2 * tokens, loss)
        before, slope = slope, (longer.blocks - peaks.blocks) / tokens
        at_loss = (longer.loss - peaks.loss) / tokens
        tokens, peaks = 2 * tokens, longer
        if slope >= least and abs(slope - before) < STEADY * slope:
            break
    return tokens, peaks, slope, at_loss


def _with(model: nn.Module, tokens: int, loss: Loss, options: dict[str, Any]) -> Peaks:
    """The peaks with other options; if the step does not fit, numbers above the GPU's memory."""
    checkpoint_blocks(model, **options)
    try:
        return measure_peaks(model, tokens, loss)
    except torch.OutOfMemoryError:
        size = torch.cuda.mem_get_info(next(model.parameters()).device)[1]
        return Peaks(size, size, size)

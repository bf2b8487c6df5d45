"""The blocks of a decoder, and which of them keep all tensors for their backward."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_longlora.architecture import find_attention_modules
from peft_longlora.memory.keep import keep_attention
from peft_longlora.memory.keep import keep_in_host as in_host
from peft_longlora.memory.offload import Offload
from peft_longlora.memory.places import HostMemory
from peft_longlora.memory.tile import find_feed_forwards, tile

_OTHERWISE = {"keep": ", or True or False", "tile_tokens": " of tokens, or None for whole rows"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DDP or nn.DataParallel, or the model itself."""
    while isinstance(model, nn.DataParallel | DistributedDataParallel):
        model = model.module
    return model


def find_blocks(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The blocks of the text model that transformers can checkpoint, in order.

    In a hybrid, blocks with a state in place of attention stand in one list with the others, and are blocks too.

    Args:
        model: a model of transformers, bare or PEFT, or wrapped (`unwrapped`).
    """
    model = unwrapped(model)
    if not getattr(model, "supports_gradient_checkpointing", True):
        return []
    attentions = set(find_attention_modules(model).values())
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and _has(attentions, one)]
    beside = {id(child) for one in lists for child in one}
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and (id(module) in beside or _has(attentions, module))
    ]


def _has(attentions: set[nn.Module], module: nn.Module) -> bool:
    return not attentions.isdisjoint(module.modules())


def checkpoint_blocks(
    model: nn.Module,
    *,
    free: int = 0,
    keep: bool | int = True,
    keep_in_host: int = 0,
    offload: bool | int = False,
    tile_tokens: int | None = None,
) -> None:
    """Checkpoint all blocks but the last `free` ones, which keep everything.

    The last blocks keep everything because their backward comes first: their tensors are freed before the other blocks
    are computed again. A second call replaces the settings of the first.

    Args:
        model: a model of transformers, bare or PEFT; it may be wrapped by DDP already.
        free: number of blocks that are not checkpointed.
        keep: whether checkpointed blocks keep the outputs of attention; or how many of them, the last ones.
        keep_in_host: how many more blocks, before those, keep them in the host's memory.
        offload: whether the inputs of checkpointed blocks wait in the host's memory (`Offload`). With n only the input
            of every n-th block waits there, and the blocks before compute the others again. This needs an n-th of the
            host's memory, and (n - 1) / 2 forwards more: half a forward with 2, a whole one with 3.
        tile_tokens: tokens of one tile in the feed-forward layers of checkpointed blocks (`tile`); None: whole rows.

    Raises:
        ValueError: a number is not whole, more blocks are free, or keep attention, than there are, a tile is below 1
            token, or transformers cannot checkpoint the model's blocks. The model is not changed then.
    """
    model = unwrapped(model)
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks that transformers can checkpoint (GradientCheckpointingLayer). "
            f"Train it without fit_memory."
        )
    for name, value in (("free", free), ("keep_in_host", keep_in_host), ("keep", keep), ("tile_tokens", tile_tokens)):
        is_switch = name == "keep" and isinstance(value, bool)
        if type(value) is not int and not is_switch and not (name == "tile_tokens" and value is None):
            raise ValueError(f"{name}={value!r} must be a whole number{_OTHERWISE.get(name, '')}.")
    if not 0 <= free <= len(blocks):
        raise ValueError(f"free={free} is outside 0 to {len(blocks)}, the number of this model's blocks.")
    if not isinstance(offload, int) or offload < 0:
        raise ValueError(f"offload={offload!r} must be True or False, or n for the input of every n-th block.")
    if tile_tokens is not None and tile_tokens < 1:
        raise ValueError(f"tile_tokens={tile_tokens} must be 1 or more tokens, or None for whole rows.")
    checkpointed = len(blocks) - free
    kept = (checkpointed - keep_in_host if keep else 0) if isinstance(keep, bool) else keep
    if min(kept, keep_in_host) < 0 or kept + keep_in_host > checkpointed:
        raise ValueError(
            f"keep={keep} and keep_in_host={keep_in_host} are not numbers of blocks that add up to 0 to "
            f"{checkpointed}, the number of checkpointed blocks."
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # transformers 5.24 renames it, and warns about the old name.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    host, before = HostMemory(), None
    for number, block in enumerate(blocks):
        options: dict[str, Any] = {"use_reentrant": False}
        if checkpointed - kept <= number < checkpointed:
            options["context_fn"] = keep_attention
        elif checkpointed - kept - keep_in_host <= number < checkpointed:
            options["context_fn"] = partial(in_host, host, number)
        call = partial(checkpoint, **options)
        if offload:
            is_again = number % int(offload) and number < checkpointed  # a free block would leave what it is given
            call = before = Offload(call, host, number, block, before if is_again else None)
        block._gradient_checkpointing_func = call
        block.gradient_checkpointing = number < checkpointed
        for module in block.modules():  # Zamba's hybrid layers hold a layer that is one by itself
            if module is not block and isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = False
        for module in find_feed_forwards(block):
            tile(module, tile_tokens if number < checkpointed else None)

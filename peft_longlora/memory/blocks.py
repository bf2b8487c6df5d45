"""The blocks of a decoder, and which of them keep what their backward needs."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_longlora.architecture import find_attention_modules
from peft_longlora.memory.keep import keep_attention


def find_blocks(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The blocks that transformers can checkpoint and that attend to text, from the first to the last."""
    attentions = set(find_attention_modules(model).values())
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and not attentions.isdisjoint(module.modules())
    ]


def checkpoint_blocks(model: nn.Module, *, free: int = 0, keep: bool = True) -> None:
    """Checkpoint all blocks but the last `free` ones, which keep everything.

    The last ones, because their backward comes first: what they keep is gone when the other blocks are computed again.

    Args:
        model: a model of transformers, bare or PEFT.
        free: number of blocks that are not checkpointed.
        keep: whether checkpointed blocks keep the outputs of attention.

    Raises:
        ValueError: more free blocks than there are, or a model whose blocks transformers cannot checkpoint.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks that transformers can checkpoint (GradientCheckpointingLayer). "
            f"Train it without fit_memory."
        )
    if not 0 <= free <= len(blocks):
        raise ValueError(f"free={free} is outside 0 to {len(blocks)}, the number of this model's blocks.")
    options = {"use_reentrant": False, **({"context_fn": keep_attention} if keep else {})}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # transformers 5.24 renames it, and warns of the old name.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable(options)
    for block in blocks[len(blocks) - free :]:
        block.gradient_checkpointing = False

"""How `scaling.py` saves memory: blocks of layers computed again together, their inputs in the host's memory, tiles."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from peft_longlora.memory import checkpoint_blocks


@dataclass(frozen=True)
class Saving:
    """What trades time for memory.

    Attributes:
        block: layers that are recomputed together; 0: every layer by itself.
        tile: tokens of a norm or an MLP at a time; 0: all.
        offload: whether what goes into a block (without blocks: into a layer) waits in the host's memory.
    """

    block: int = 0
    tile: int = 0
    offload: bool = False

    def apply(self, model: nn.Module) -> None:
        """Switch on gradient checkpointing of a PEFT model of Llama, and what is asked beside it."""
        base = model.get_base_model()
        if self.tile:
            for layer in base.model.layers:
                for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
                    setattr(layer, name, Tiled(getattr(layer, name), self.tile))
        if not self.block and self.offload:
            checkpoint_blocks(model, keep=False, offload=True)
            return
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.block:
            layers = list(base.model.layers)
            base.model.layers = nn.ModuleList(
                Block(layers[i : i + self.block], self.offload) for i in range(0, len(layers), self.block)
            )


PLAIN = Saving()


class Block(nn.Module):
    """Several layers that are recomputed together in the backward, before each is by itself.

    What goes into a block, (1, S, hidden size), is kept until then: on the GPU, or in the CPU's memory. The copies do
    not run beside the arithmetic as those of `checkpoint_blocks` do, so no second input is on the GPU meanwhile: in the
    longest rows an input has gigabytes.
    """

    def __init__(self, layers: list[nn.Module], is_offloaded: bool):
        super().__init__()
        self.layers, self.is_offloaded = nn.ModuleList(layers), is_offloaded

    def forward(self, hidden, **kwargs):
        def run(hidden):
            for layer in self.layers:
                hidden = layer(hidden, **kwargs)
            return hidden

        with save_on_cpu(pin_memory=hidden.is_cuda) if self.is_offloaded else nullcontext():
            return checkpoint(run, hidden, use_reentrant=False)


class Tiled(nn.Module):
    """A norm or an MLP that holds the intermediate values of some tokens at a time."""

    def __init__(self, inner: nn.Module, tokens: int):
        super().__init__()
        self.inner, self.tokens = inner, tokens

    def forward(self, hidden):
        parts = hidden.split(self.tokens, dim=1)
        return torch.cat([checkpoint(self.inner, part, use_reentrant=False) for part in parts], dim=1)

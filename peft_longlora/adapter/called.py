"""Adapted projections must be called: a layer that computes with their weights itself leaves the adapter out.

Mamba's kernels compute a layer as a whole and take the weight of `out_proj`; Jamba multiplies by that of `dt_proj`. An
adapter there would get no gradient, and nobody would notice. Which way a layer takes depends on the installed kernels,
the device and the mode, so it is seen in training. `model` puts this on each projection that it adapts.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_longlora.rope.mixing import Mixin, mix

# Reading a weight may have another reason (its dtype), but then a call follows. Two reads a forward are usual.
MOST_READS = 8


class SeesReads(Mixin):
    """Mixed into a LoRA layer's class: refuses to be read in training, time and again, without being called.

    Only reads while a module is called count: who looks at weights between steps is free to.

    Attributes:
        reads: of its weight in training with gradients, since the last call.
        full_name: its name in the model.
    """

    reads = 0
    full_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The projection with its adapters."""
        if not torch.compiler.is_compiling():
            self.reads = 0
        return super().forward(*args, **kwargs)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, as PEFT has it. Raises: RuntimeError: the adapter is left out in training."""
        if not torch.compiler.is_compiling() and self.training and torch.is_grad_enabled() and is_in_a_call():
            self.reads += 1
            if self.reads >= MOST_READS and not self.disable_adapters and self.active_adapters:
                self.reads = 0
                name = self.full_name.rsplit(".", 1)[-1]
                raise RuntimeError(
                    f"The adapter of {self.full_name} is left out and would never be trained: the layer that it "
                    f"belongs to computes with its weight and does not call it. Leave {name!r} out of target_modules, "
                    f"or give exclude_modules=[{name!r}]."
                )
        return super().weight


def is_in_a_call() -> bool:
    """Whether the caller runs on behalf of a module that is called."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back
    return frame is not None


def watch(layer: nn.Module, full_name: str) -> None:
    """See how often the weight of a LoRA layer is read. Layers of whole parameters (experts) have none to read."""
    if isinstance(layer, LoraLayer) and type(layer).weight is BaseTunerLayer.weight:
        mix(layer, SeesReads)
        layer.full_name = full_name

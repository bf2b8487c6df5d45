"""Measure the memory that a training step needs on its GPU, in each of its three parts. Called by `fit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_longlora.architecture import find_attention_modules, same_modes
from peft_longlora.attention.settings import schedule_of
from peft_longlora.memory.blocks import find_blocks

# Computes the loss of a step, from a model and ids (1, S).
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Peaks:
    """Bytes at the peaks of one forward and one backward, weights included.

    Attributes:
        loss: until the gradient of the loss has reached the last block. An output layer that is trained has its
            gradient by then, and what a fused loss needs beside it.
        blocks: from then on, until the embeddings' gradient is made.
        end: from then on; 0 if the embeddings' output needs no gradient. Tied embeddings have a gradient from the
            output layer already. The two are there together, and a copy of their sum.
    """

    loss: int
    blocks: int
    end: int


def measure_peaks(model: nn.Module, tokens: int, loss: Loss) -> Peaks:
    """Compute a step of random ids (1, tokens). The model is not changed.

    Args:
        model: on its GPU, with blocks that `find_blocks` finds.
        tokens: of the row.
        loss: as `fit_memory` takes it.

    Returns: the peaks, in bytes.

    Raises: torch.OutOfMemoryError: the step does not fit.
    """
    device = next(model.parameters()).device
    embeddings, found = model.get_input_embeddings(), {}

    def read(part: str) -> None:
        found[part] = max(found.get(part, 0), torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)

    def watch(part: str, output: Any) -> None:
        # An output has its gradient when the backward of all that follows it is through.
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(lambda _: read(part))

    last = find_blocks(model)[-1]
    watched = [
        module.register_forward_hook(lambda _module, _given, output, part=part: watch(part, output))
        for module, part in ((last, "loss"), (embeddings, "blocks"))
    ]
    schedules = {id(one): one for one in map(schedule_of, find_attention_modules(model).values()) if one is not None}
    counts = {key: one.training_forwards for key, one in schedules.items()}
    try:
        with same_modes(model), torch.random.fork_rng(devices=[device]):
            model.train()
            ids = torch.randint(embeddings.weight.shape[0], (1, tokens), device=device)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            loss(model, ids).backward()
            torch.cuda.synchronize(device)
        read("end" if "blocks" in found else "blocks")
        return Peaks(found.get("loss", found["blocks"]), found["blocks"], found.get("end", 0))
    finally:
        for one in watched:
            one.remove()
        model.zero_grad(set_to_none=True)
        for key, one in schedules.items():  # `dense_every` must count only the training's forwards
            one.training_forwards = counts[key]

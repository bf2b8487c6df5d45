"""The number of training forwards, among an adapter's tensors: what a resumed run needs of `dense_every`.

A Trainer that resumes reads an adapter's weights and not its config, so the number is a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of

COUNT = "longlora_training_forwards"
PREFIX = "base_model.model."


def add_count(state: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Put the number of a model's training forwards among the tensors of an adapter, if its schedule needs it."""
    settings = next(map(settings_of, find_attention_modules(model).values()), None)
    if settings is not None and settings.schedule.dense_every:
        prefix = PREFIX if any(name.startswith(PREFIX) for name in state) else ""
        state[prefix + COUNT] = torch.tensor([settings.training_forwards])


def take_count(state: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Take the number out of the tensors of an adapter, and let the model go on from it."""
    for name in [name for name in state if name.endswith(COUNT)]:
        count = int(state.pop(name))
        for module in find_attention_modules(model).values():
            settings_of(module).training_forwards = count


def without_count(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Of an adapter's tensors, or of their shapes, by name: those that are weights."""
    return {name: value for name, value in tensors.items() if not name.endswith(COUNT)}

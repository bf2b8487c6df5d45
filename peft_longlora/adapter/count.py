"""The number of training forwards, saved among an adapter's tensors. A resumed run needs it for `dense_every`.

A Trainer that resumes reads an adapter's weights but not its config, so the number is saved as a tensor.
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
    """Add the number of a model's training forwards to the tensors of an adapter, if its schedule needs the number."""
    settings = next(map(settings_of, find_attention_modules(model).values()), None)
    if settings is not None and settings.schedule.dense_every:
        prefix = PREFIX if any(name.startswith(PREFIX) for name in state) else ""
        state[prefix + COUNT] = torch.tensor([settings.training_forwards])


def take_count(state: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Remove the number from the tensors of an adapter, and let the model continue from it."""
    for name in [name for name in state if name.endswith(COUNT)]:
        count = int(state.pop(name))
        for module in find_attention_modules(model).values():
            settings_of(module).training_forwards = count


def without_count(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an adapter (or their shapes) by name, without the number."""
    return {name: value for name, value in tensors.items() if not name.endswith(COUNT)}

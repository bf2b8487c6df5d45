"""The number of training forwards, saved among an adapter's tensors. A resumed run needs it for `dense_every`
and `skip_positions`.

A Trainer that resumes reads an adapter's weights but not its config, so the number is saved as a tensor. PEFT saves and
loads it (`add_count`, `take_count`). FSDP2's full state, DeepSpeed and transformers' own `load_adapter` go past PEFT,
so it is a buffer of the base too (`CountBuffer`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.utils.hooks import RemovableHandle

from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of

# Not "longlora_...": transformers' load_adapter takes "lora_" in a name for a weight of LoRA.
COUNT = "s2_training_forwards"
_ENDING = "training_forwards"  # of the name, also in files that were made when it was "longlora_training_forwards"
PREFIX = "base_model.model."


def add_count(state: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Add the number of a model's training forwards to the tensors of an adapter, if its schedule needs the number."""
    if (number := _number_of(model)) is not None:
        prefix = PREFIX if any(name.startswith(PREFIX) for name in state) else ""
        state[prefix + COUNT] = torch.tensor([number])


def take_count(state: dict[str, torch.Tensor], model: nn.Module, config: PeftConfig) -> None:
    """Remove the number from the tensors of an adapter, and let the model continue from it.

    An adapter that is only used beside others (a reference, the initial adapter of a conversion) leaves their number.
    """
    is_beside = config.inference_mode and len(getattr(model, "peft_config", {})) > 1
    for name in [name for name in state if name.endswith(_ENDING)]:
        number = count_in(name, state.pop(name))
        if not is_beside:
            _continue_from(model, number)


def count_in(name: str, tensor: torch.Tensor) -> int:
    """The number that a tensor of a file holds.

    Raises: ValueError: it is not one number of forwards.
    """
    if tensor.is_floating_point() or tensor.numel() != 1 or int(tensor) < 0:
        raise ValueError(
            f"tensor {name}={tensor.tolist()} must be one whole number of training forwards, 0 or more, by which "
            f"dense_every and skip_positions go on. The file is damaged: get it again, or take an earlier checkpoint."
        )
    return int(tensor)


def without_count(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of an adapter (or their shapes) by name, without the number."""
    return {name: value for name, value in tensors.items() if not name.endswith(_ENDING)}


def _number_of(model: nn.Module) -> int | None:
    """The number of training forwards, or None if the model has no schedule."""
    settings = next(map(settings_of, find_attention_modules(model).values()), None)
    return settings.training_forwards if settings is not None and settings.schedule.is_counting else None


def _continue_from(model: nn.Module, number: int) -> None:
    for module in find_attention_modules(model).values():
        settings_of(module).training_forwards = number


@dataclass(eq=False)
class CountBuffer:
    """The number as a buffer of a base model while it has an adapter with a schedule; it is written when it is saved.

    Attributes:
        model: the base model. handles: the hooks of its state dict.
        watch: the hook that hears of buffers which are set on modules.
    """

    model: nn.Module
    handles: list[RemovableHandle] = field(default_factory=list)
    watch: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "watch": None}  # torch's list of these hooks is not copied or saved

    def attach(self) -> None:
        """Add the buffer, if the model's settings have a schedule."""
        if _number_of(self.model) is None:
            return
        device = self.model.get_input_embeddings().weight.device  # DDP takes buffers on its own device only
        number = torch.zeros(1, dtype=torch.long, device="cpu" if device.type == "meta" else device)
        self.model.register_buffer(COUNT, number)
        self.handles = [
            self.model.register_state_dict_post_hook(self),
            self.model.register_load_state_dict_pre_hook(self._read),
        ]
        self.watch = register_module_buffer_registration_hook(partial(_take_buffer, weakref.ref(self.model)))
        weakref.finalize(self.model, self.watch.remove)  # torch holds this hook, not the model

    def detach(self) -> None:
        """Remove the buffer."""
        for handle in self.handles:
            handle.remove()
        if self.handles:
            delattr(self.model, COUNT)
        if self.watch is not None:
            self.watch.remove()
        self.handles, self.watch = [], None

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Hook: the model's state dict was made."""
        buffer = getattr(self.model, COUNT)
        if buffer.is_meta:  # accelerate lists what it will shard, and a buffer is whole on every rank
            state.pop(prefix + COUNT, None)
        else:
            state[prefix + COUNT] = torch.tensor([_number_of(self.model) or 0], device=buffer.device)

    def _read(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        found = state.get(prefix + COUNT)
        if found is None:  # the file of a model without a schedule, or of weights alone
            state[prefix + COUNT] = torch.tensor([_number_of(self.model) or 0])
        elif not found.is_meta:
            _continue_from(self.model, count_in(prefix + COUNT, found))


def _take_buffer(wanted: weakref.ref[nn.Module], module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
    """Hook: a module gets a buffer. transformers' `load_adapter` puts the number of its file in this way."""
    if name == COUNT and module is wanted() and buffer is not None and not buffer.is_meta:
        _continue_from(module, count_in(name, buffer))

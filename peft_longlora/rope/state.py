"""The rotary modules of a model and all that its RoPE is made of, so that it can be replaced and put back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peft_longlora.architecture import find_rotary_modules
from peft_longlora.rope.parameters import window_of

STATES = "longlora_rope"


@dataclass
class RopeState:
    """Everything that RoPE is made of in one model, so that it can be put back bit for bit.

    Attributes:
        rope_parameters, max_position_embeddings, head_dim: of the text config.
        window: tokens, as the text config states it.
        modules: (rotary module, its buffers, its plain attributes).
    """

    rope_parameters: dict[str, Any] | None
    max_position_embeddings: int
    head_dim: int | None
    window: int
    modules: list[tuple[nn.Module, dict[str, torch.Tensor], dict[str, Any]]] = field(repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> RopeState:
        """What RoPE of `model` is made of now."""
        config = model.config.get_text_config()
        modules = [(m, dict(m.named_buffers(recurse=False)), attributes_of(m)) for m in find_rotary_modules(model)]
        return cls(
            copy.deepcopy(config.rope_parameters),
            config.max_position_embeddings,
            getattr(config, "head_dim", None),
            window_of(config),
            modules,
        )

    def put_on(self, model: PreTrainedModel) -> None:
        """Give `model` this RoPE."""
        config = model.config.get_text_config()
        config.rope_parameters = copy.deepcopy(self.rope_parameters)
        config.max_position_embeddings = self.max_position_embeddings
        if hasattr(config, "head_dim"):
            config.head_dim = self.head_dim
        for module, buffers, attributes in self.modules:
            transplant(module, buffers, attributes)


def rope_of(model: PreTrainedModel, *, scaled: bool) -> RopeState:
    """The RoPE of the base, or the rescaled one, whichever is in force; they are the same if nothing was rescaled."""
    return getattr(model, STATES)[int(scaled)] if hasattr(model, STATES) else RopeState.of(model)


def fresh(module: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """A rotary module such as `module`, as transformers makes it from `config`."""
    with torch.device("cpu"):
        return type(module)(config)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What a module computes with, besides its buffers."""
    others = ("training", "config", "forward")  # "forward": accelerate's hooks (device_map) put one on the instance
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in others}


def transplant(module: nn.Module, buffers: dict[str, torch.Tensor], attributes: dict[str, Any]) -> None:
    """Give a module other buffers and attributes, keeping the object itself, which hooks and users may hold."""
    device = next(module.buffers()).device
    for name in attributes_of(module).keys() - attributes.keys():
        delattr(module, name)  # "longrope" leaves frequencies behind here that belong to the old scaling
    for name in dict(module.named_buffers(recurse=False)).keys() - buffers.keys():
        delattr(module, name)
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer.to(device), persistent=False)
    for name, value in attributes.items():
        setattr(module, name, value)

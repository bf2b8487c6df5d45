"""Everything that belongs to the RoPE of one model, so that it can be replaced and put back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from peft_longlora.architecture import find_rotary_modules, one_of
from peft_longlora.rope.parameters import check_form, window_of

STATES = "longlora_rope"
OWNER = "longlora_adapters"  # adapters put it on a model whose RoPE they switch


@dataclass
class RopeState:
    """The RoPE of one model: config entries, buffers and attributes, to put back bit for bit.

    Attributes:
        rope_parameters, max_position_embeddings, head_dim: of the text config. head_dim is None if it has none, or
            if layers differ in it.
        window: tokens, as the text config gives it.
        modules: (rotary module, its buffers, its plain attributes).
    """

    rope_parameters: dict[str, Any] | None
    max_position_embeddings: int
    head_dim: int | None
    window: int
    modules: list[tuple[nn.Module, dict[str, torch.Tensor], dict[str, Any]]] = field(repr=False)
    handles: list[RemovableHandle] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> RopeState:
        """The RoPE that `model` has now."""
        config = model.config.get_text_config()
        if find_rotary_modules(model):
            check_form(config)
        modules = [(m, dict(m.named_buffers(recurse=False)), attributes_of(m)) for m in find_rotary_modules(model)]
        return cls(
            copy.deepcopy(getattr(config, "rope_parameters", None)),
            config.max_position_embeddings,
            one_of(config, "head_dim"),
            window_of(config),
            modules,
        )

    def put_on(self, model: PreTrainedModel) -> None:
        """Give `model` this RoPE."""
        self._write(model.config.get_text_config())
        for module, buffers, attributes in self.modules:
            transplant(module, buffers, attributes)

    def _write(self, config: PreTrainedConfig) -> None:
        if self.rope_parameters is not None or hasattr(config, "rope_parameters"):
            config.rope_parameters = copy.deepcopy(self.rope_parameters)
        config.max_position_embeddings = self.max_position_embeddings
        if self.head_dim is not None or one_of(config, "head_dim") is not None:
            config.head_dim = self.head_dim

    def twins_on(self, model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
        """Each rotary module of `model`, and another one beside it that has this RoPE."""
        self._write(config := copy.deepcopy(model.config.get_text_config()))
        twins = []
        for module, buffers, attributes in self.modules:
            twins.append((module, fresh(module, config).to(next(module.buffers()).device)))
            transplant(twins[-1][1], buffers, attributes)
        return twins

    def keep(self) -> None:
        """Put the frequencies back before each use if `model.to(torch.bfloat16)` or the like has rounded them."""
        self.handles = [
            module.register_forward_pre_hook(_Keeper(buffers, attributes))
            for module, buffers, attributes in self.modules
        ]

    def let_go(self) -> None:
        """End `keep`."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


@dataclass(eq=False)
class _Keeper:
    """A hook of a rotary module; an object, which deepcopy and pickle bind to the copy."""

    buffers: dict[str, torch.Tensor]
    attributes: dict[str, Any]

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if any(module._buffers[n].dtype != b.dtype for n, b in self.buffers.items() if n in module._buffers):
            # The attributes too: "dynamic" and "longrope" note there which frequencies are in force after a long row.
            transplant(module, self.buffers, self.attributes)


def rope_of(model: PreTrainedModel, *, scaled: bool) -> RopeState:
    """The base's RoPE or the rescaled one, whichever of them is in use. Without rescaling both are the same."""
    return getattr(model, STATES)[int(scaled)] if hasattr(model, STATES) else RopeState.of(model)


def fresh(module: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """A new rotary module of the type of `module`, as transformers makes it from `config`."""
    with torch.device("cpu"):
        return type(module)(config)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that a module computes with, besides its buffers."""
    others = ("training", "config", "forward")  # accelerate's hooks (device_map) put a "forward" on the instance
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in others}


def transplant(module: nn.Module, buffers: dict[str, torch.Tensor], attributes: dict[str, Any]) -> None:
    """Give a module other buffers and attributes. The object stays the same, because hooks and users may hold it."""
    device = next(module.buffers()).device
    for name in attributes_of(module).keys() - attributes.keys():
        delattr(module, name)  # "longrope" leaves frequencies of the old scaling here
    for name in dict(module.named_buffers(recurse=False)).keys() - buffers.keys():
        delattr(module, name)
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer.to(device), persistent=False)
    for name, value in attributes.items():
        setattr(module, name, value)

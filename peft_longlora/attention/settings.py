"""Which layers attend how: the settings on the attention layers of a model.

`configure_attention` puts one `AttentionSettings` on all attention modules of a model, and `layer` reads it there.
Nothing is stored in module globals, so two models in one process do not affect each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from peft_longlora.architecture import (
    find_attention_modules,
    is_causal_layer,
)
from peft_longlora.attention.effect import RATIO
from peft_longlora.attention.inputs import ModelInputs
from peft_longlora.attention.schedule import Schedule
from peft_longlora.attention.skips import Skips
from peft_longlora.attention.states import StateLayers
from peft_longlora.kernels.patterns import group_size_of, whole_number
from peft_longlora.rope.parameters import window_of

logger = logging.get_logger(__name__)

S2_ATTN = "s2_attn"
FASTEST = "fastest"  # as `dense_attention`: the fastest installed kernel, not a transformers attention
Mode = Literal["auto", "sparse", "dense"]
_SETTINGS = "s2_settings"


class Sharing(Protocol):
    """The ranks that share each sequence: `sequence.layer.SharedSequence`."""

    def attend(self, call: Any, pattern: str) -> torch.Tensor:
        """A layer's attention on this rank's stretch; `call` is a `layer.LayerCall`."""

    def place(self, mask: Any, position_ids: torch.Tensor | None, group_size: int) -> tuple[int, int]:
        """The tokens before this rank's stretch, and those of them that belong to its first document."""


@dataclass
class AttentionSettings:
    """How the layers of one model attend; shared by all of them.

    Attributes:
        config: the model's text config; its window may determine the group size.
        given_size: G in tokens, if the user gave it. group_size_ratio: otherwise G as a fraction of the window.
        pattern: one of `patterns.PATTERNS` and `patterns.BLOCK_PATTERNS`.
        chosen_blocks: how many blocks of keys "adaptive" chooses; None: as `s2_attention`.
        dense_layers: indices of layers that stay dense in training.
        dense_attention: the transformers attention that runs if S2-Attn does not.
        is_fastest: whether whole causal rows go through the fastest kernel instead.
        backend: the kernel of sparse layers, one of `backends.BACKENDS`, or None for the fastest.
        mode: "auto" (sparse while training), "sparse" or "dense"; set by `use_attention`.
        sharing: the ranks that share each sequence (`sequence.parallelize_sequence`), or None.
        is_enabled: False while the adapter of these settings is switched off; then the model attends as its base.
        schedule: which training forwards are dense in every layer, and whether positions skip in the others.
        refuses_packed: why this model takes no rows of several documents (see `trial`), or None.
        warned: of what (see `caution`).
        inputs: the arguments of the model's last call.
        states: keeps documents apart in layers with a state along the sequence.
        skips: moves the positions of sparse training forwards.
        probe: a function that gets every call of a layer (a `layer.LayerCall`) before it is computed; or None.
    """

    config: PreTrainedConfig = field(repr=False)
    given_size: int | None = None
    group_size_ratio: float = RATIO
    pattern: str = "s2"
    dense_layers: frozenset[int] = frozenset()
    dense_attention: str = "sdpa"
    backend: str | None = None
    is_fastest: bool = False
    mode: Mode = "auto"
    chosen_blocks: int | None = None
    sharing: Sharing | None = field(default=None, repr=False, compare=False)
    is_enabled: bool = True
    schedule: Schedule = field(default_factory=Schedule)
    refuses_packed: str | None = field(default=None, repr=False, compare=False)
    warned: set[str] = field(default_factory=set, repr=False, compare=False)
    inputs: ModelInputs = field(init=False, repr=False, compare=False)
    states: StateLayers = field(init=False, repr=False, compare=False)
    skips: Skips = field(init=False, repr=False, compare=False)
    probe: Callable[[Any], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.inputs = ModelInputs(self)
        self.states = StateLayers(self)
        self.skips = Skips(self)

    @property
    def group_size(self) -> int:
        """G in tokens. If it is a fraction of the window, it follows the window."""
        return group_size_of(self.given_size, self.group_size_ratio, window_of(self.config))

    @property
    def training_forwards(self) -> int:
        """The number of training forwards of the model (see `Schedule`), counted if `dense_every` or
        `skip_positions` is set.

        An adapter's checkpoint holds this number. Without an adapter, set it when you resume training:
        `settings.training_forwards = trainer_state.global_step * gradient_accumulation_steps`. If the rows of an epoch
        do not fill its last step, that step has fewer forwards: count the batches of whole epochs instead.
        """
        return self.schedule.training_forwards

    @training_forwards.setter
    def training_forwards(self, count: int) -> None:
        """Raises: ValueError: a number that cannot be one of forwards."""
        number = whole_number(count)
        if number is None or number < 0:
            raise ValueError(f"training_forwards={count!r} must be a whole number of forwards, 0 or more.")
        self.schedule.training_forwards = number

    def pattern_of(self, module: nn.Module) -> str:
        """The pattern of a layer in a sparse forward."""
        if not self.dense_layers:  # a compiled block that reads its number serves no other block
            return self.pattern
        return "full" if getattr(module, "layer_idx", None) in self.dense_layers else self.pattern

    def is_sparse(self, training: bool) -> bool:
        """Whether a forward of a module in this mode is sparse."""
        return self.is_enabled and (self.mode == "sparse" or (self.mode == "auto" and training))


@dataclass(frozen=True)
class AttentionState:
    """The attention of a model before an adapter changed it."""

    implementation: str | dict[str, str]
    settings: dict[str, AttentionSettings]

    @classmethod
    def of(cls, model: PreTrainedModel) -> AttentionState:
        """The current attention of `model`."""
        layers = find_attention_modules(model)
        found = {name: getattr(module, _SETTINGS) for name, module in layers.items() if hasattr(module, _SETTINGS)}
        parts = {"": model.config, **{name: getattr(model.config, name, None) for name in model.config.sub_configs}}
        names = {name: getattr(part, "_attn_implementation", None) for name, part in parts.items()}
        known = {name: each for name, each in names.items() if each is not None}  # some parts are no models
        return cls(known if len(known) > 1 else model.config._attn_implementation, found)

    def put_on(self, model: PreTrainedModel) -> None:
        """Restore this attention on `model`."""
        model.set_attn_implementation(self.implementation)
        replace_settings(model, self.settings)


def settings_of(module: nn.Module) -> AttentionSettings:
    """The settings of an attention layer; the defaults if `configure_attention` was never called."""
    settings = getattr(module, _SETTINGS, None)
    if settings is None:
        if is_causal_layer(module):
            settings = AttentionSettings(module.config)
        else:  # for example an image encoder, whose config has no window
            settings = AttentionSettings(module.config, 2, pattern="full")
        settings.dense_attention = _default_attention(module)
        setattr(module, _SETTINGS, settings)
    return settings


def settings_on(model: nn.Module) -> AttentionSettings | None:
    """The settings on a model's attention layers; None if there are none yet."""
    layers = find_attention_modules(model).values()
    return next((getattr(module, _SETTINGS) for module in layers if hasattr(module, _SETTINGS)), None)


def _default_attention(module: nn.Module) -> str:
    """The implementation that transformers uses by default: sdpa, or eager if sdpa would be wrong for the model."""
    classes = vars(sys.modules[type(module).__module__]).values()
    models = [c for c in classes if isinstance(c, type) and issubclass(c, PreTrainedModel) and c is not PreTrainedModel]
    kind = type(getattr(module, "config", None))
    models = [c for c in models if c.config_class is kind] or models  # of a file's models, those that hold the layer
    return "sdpa" if all(model._supports_sdpa for model in models) else "eager"


def replace_settings(model: PreTrainedModel, settings: dict[str, AttentionSettings]) -> None:
    """Replace the settings of the attention layers, by name."""
    for name, module in find_attention_modules(model).items():
        if hasattr(module, _SETTINGS):
            getattr(module, _SETTINGS).inputs.leave()
            getattr(module, _SETTINGS).states.leave()
            getattr(module, _SETTINGS).skips.leave()
            delattr(module, _SETTINGS)
        if name in settings:
            setattr(module, _SETTINGS, settings[name])
    for one in {id(s): s for s in settings.values()}.values():
        one.inputs.follow(model)
        one.states.follow(model)
        one.skips.follow(model)


def schedule_of(module: nn.Module) -> Schedule | None:
    """The schedule of an attention layer's model, or None if `configure_attention` was never called."""
    settings = getattr(module, _SETTINGS, None)
    return None if settings is None else settings.schedule

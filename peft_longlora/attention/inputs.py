"""What a model is called with, for its layers: some architectures do not hand it on to them.

Held by the settings of a model's layers (`settings`), read by `attention`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from peft_longlora.architecture import find_text_model
from peft_longlora.attention.schedule import Schedule

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before


@dataclass
class Call:
    """The call of a model that is under way, or was the last.

    Attributes:
        position_ids: (1 or B, S) as the model was given them.
        cu_seq_lens: (documents + 1) numbers of tokens before each document's end, as collators for flash kernels give.
        has_cache: whether the caller gave a cache, empty or not, as `generate` does.
        caller: which of the followed modules was called from outside, while it runs.
        handles: the hooks that note all this.
    """

    position_ids: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None
    has_cache: bool = False
    caller: int | None = None
    handles: list[RemovableHandle] = field(default_factory=list)

    def follow(self, model: PreTrainedModel, schedule: Schedule) -> None:
        """Note every call of `model` from now on, and begin a forward of `schedule` with each."""
        # The backbone too: trainers that compute the loss themselves do not call the whole model.
        models = [model, getattr(model, "base_model", model), find_text_model(model)]
        for number, one in enumerate(dict.fromkeys(models)):
            before, after = _Before(self, schedule, number, _index_of_positions(one)), _After(self, number)
            self.handles.append(one.register_forward_pre_hook(before, with_kwargs=True))
            self.handles.append(one.register_forward_hook(after, always_call=True))

    def leave(self) -> None:
        """Note no calls any more."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def positions(self, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """(1 or B, S) positions, from what a layer got or from what the model got.

        None while a call is under way that gave none: then the model counts its tokens from the first to the last.
        """
        given = kwargs.get("position_ids")
        is_counted = self.caller is not None and self.position_ids is None
        return self.position_ids if given is None or is_counted else given

    def boundaries(self, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Cumulative lengths of the documents, from what a layer got or from what the model got."""
        given = kwargs.get("cu_seq_lens_q")
        return self.cu_seq_lens if given is None else given


@dataclass
class _Before:
    """Hook: a followed module is called."""

    call: Call
    schedule: Schedule
    number: int
    index: int | None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call, position_ids, cu_seq_lens = self.call, kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
        if position_ids is None and self.index is not None and len(args) > self.index:
            position_ids = args[self.index]
        if call.caller is None:
            call.caller, call.position_ids, call.cu_seq_lens = self.number, position_ids, cu_seq_lens
            call.has_cache = any(kwargs.get(name) is not None for name in CACHE_NAMES)
            self.schedule.begin(module.training)
        else:  # by another one, which may keep to itself what it was given
            call.position_ids = call.position_ids if position_ids is None else position_ids
            call.cu_seq_lens = call.cu_seq_lens if cu_seq_lens is None else cu_seq_lens


@dataclass
class _After:
    """Hook: a followed module returns, or fails."""

    call: Call
    number: int

    def __call__(self, *_: Any) -> None:
        if self.call.caller == self.number:
            self.call.caller = None


def _index_of_positions(model: nn.Module) -> int | None:
    """Where `position_ids` stands among a model's arguments."""
    parameters = list(inspect.signature(model.forward).parameters)
    return parameters.index("position_ids") if "position_ids" in parameters else None

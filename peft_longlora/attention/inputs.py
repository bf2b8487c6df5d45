"""The arguments of a model's call, for its layers: some architectures do not pass them on.

The settings of a model's layers (`settings`) hold them; `layer` reads them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from peft_longlora.architecture import find_entrances, follow
from peft_longlora.attention.schedule import Schedule

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before


@dataclass
class ModelInputs:
    """The current call of a model, or its last one.

    Attributes:
        schedule: counts the calls from outside.
        position_ids: (1 or B, S), as the caller gave them.
        cu_seq_lens: (documents + 1) numbers of tokens before each document's end, as collators for flash kernels give.
        has_cache: whether the caller gave a cache, empty or not, as `generate` does.
        notes: facts that layers found in this call, for recomputation (see `layer`).
        caller: the module that was called from outside, while it runs.
        places: for the class of each followed module, the place of `position_ids` among its arguments.
        handles: the hooks that record all this.
    """

    schedule: Schedule = field(default_factory=Schedule)
    position_ids: torch.Tensor | None = None
    cu_seq_lens: torch.Tensor | None = None
    has_cache: bool = False
    notes: dict[Any, Any] = field(default_factory=dict)
    caller: nn.Module | None = None
    places: dict[str, int | None] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def follow(self, model: PreTrainedModel) -> None:
        """Record every call of `model` from now on."""
        for module in find_entrances(model):
            arguments = list(inspect.signature(module.forward).parameters)
            self.places[type(module).__name__] = (
                arguments.index("position_ids") if "position_ids" in arguments else None
            )
        self.handles = follow(model, self._before, self._after)

    def leave(self) -> None:
        """Stop recording calls."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def positions(self, more: dict[str, Any]) -> torch.Tensor | None:
        """(1 or B, S) positions, from the arguments of a layer or of the model.

        Returns None if the model was called without position_ids: it then counts every token of the row, so what a
        layer got says nothing about documents.
        """
        given = more.get("position_ids")
        is_counted = self.caller is not None and self.position_ids is None
        return self.position_ids if given is None or is_counted else given

    def boundaries(self, more: dict[str, Any]) -> torch.Tensor | None:
        """Cumulative lengths of the documents, from the arguments of a layer or of the model."""
        given = more.get("cu_seq_lens_q")
        return self.cu_seq_lens if given is None else given

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Hook: a followed module is called."""
        if kwargs is None:  # torch drops them if another hook removed this one during the same call
            return
        position_ids, cu_seq_lens = kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q")
        place = self.places.get(type(module).__name__)
        if position_ids is None and place is not None and len(args) > place:
            position_ids = args[place]
        if self.caller is None:
            self.caller, self.position_ids, self.cu_seq_lens = module, position_ids, cu_seq_lens
            self.has_cache = any(kwargs.get(name) is not None for name in CACHE_NAMES)
            self.notes = {}
            self.schedule.begin(module.training)
        else:  # another followed module called it, and may not pass on its arguments
            self.position_ids = self.position_ids if position_ids is None else position_ids
            self.cu_seq_lens = self.cu_seq_lens if cu_seq_lens is None else cu_seq_lens

    def _after(self, module: nn.Module, *_: Any) -> None:
        """Hook: a followed module returns, or fails."""
        if self.caller is module:
            self.caller = None

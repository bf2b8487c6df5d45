"""The arguments of a model's call, for its layers: some architectures do not pass them on.

One `ModelInputs` belongs to the settings of a model's layers. What happens to it, in the order of a training step:

    the model is called   `_before` begins a `Call`: it keeps the arguments, `lengths` checks them, and `schedule`
                          counts the forward
    its layers run        `layer`, `states`, `skips` and `caution` read the current `Call`; what the first layer finds
                          is in its notes for the others
    the model returns     `_after` ends the `Call`; its `pending.Forward` is then known for as long as its graph
    the backward runs     a checkpointed layer is computed again: `layer` asks its mask and the last call, `states` asks
                          `pending.Forwards`
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from peft_longlora.architecture import CACHE_ARGUMENTS, find_entrances, follow
from peft_longlora.attention.axes import has_axes_only, text_positions
from peft_longlora.attention.lengths import check_lengths, check_numbers_of_documents, check_padding, check_restarts
from peft_longlora.attention.pending import Forward, next_node

if TYPE_CHECKING:
    from peft_longlora.attention.settings import AttentionSettings

LOOKS = 8  # training calls of which numbers on a device are looked at


@dataclass
class Call:
    """One call of a model.

    Attributes:
        position_ids: (1 or B, S), as the caller gave them; of several axes, the text's (see `text_positions`).
        are_of_axes: whether `text_positions` counted them, from 0 at the row's start.
        attention_mask: as the caller gave it.
        cu_seq_lens: (documents + 1) numbers of tokens before each document's end, as collators for flash kernels give.
        has_cache: whether the caller gave a cache, empty or not, as `generate` does.
        has_gradients: whether it may be followed by a backward.
        begins: the number of the first node of its graph (`pending.next_node`).
        forward: what recomputation must know of it; None until a layer with a state asks for it (`states`).
        notes: facts that layers found in this call, for recomputation (`layer`), and the positions of `skips`.
        caller: the module that was called from outside, while it runs.
    """

    position_ids: torch.Tensor | None = None
    are_of_axes: bool = False
    attention_mask: Any = None
    cu_seq_lens: torch.Tensor | None = None
    has_cache: bool = False
    has_gradients: bool = False
    begins: int | None = None
    forward: Forward | None = None
    notes: dict[Any, Any] = field(default_factory=dict)
    caller: nn.Module | None = None


class OfThread(threading.local):
    """What belongs to one thread: threads may share a model.

    Attributes:
        call: the current or last call in this thread. frame: Python's frame that called the module, while it runs.
        running: the layer that runs on documents apart, and with what (`StateLayers.running`).
    """

    call: Call | None = None
    frame: FrameType | None = None
    running: Any = None

    def __reduce__(self) -> Any:
        return OfThread, ()  # a copied model runs in no thread


@dataclass
class ModelInputs:
    """The current call of a model, or its last one.

    Attributes:
        settings: of the model's attention; its schedule counts the calls from outside.
        last: the last call, of any thread. Threads of autograd, which call no model, use it to recompute layers.
        compiled: `last` is this one if the beginning of the call is compiled; such calls know no threads.
        thread: what belongs to the current thread.
        places: for the class of each followed module, the places of its arguments by name. (FSDP2 gives modules
            classes of their own later, below these, and Liger gives classes another forward.)
        handles: the hooks that record all this.
        looks: training calls whose documents were checked.
    """

    settings: AttentionSettings = field(repr=False, compare=False)
    last: Call = field(default_factory=Call)
    compiled: Call = field(default_factory=Call)
    thread: OfThread = field(default_factory=OfThread)
    places: dict[type, dict[str, int]] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    looks: int = 0

    @property
    def now(self) -> Call:
        """The current call, or the last one."""
        if torch.compiler.is_compiling() or self.last is self.compiled or self.thread.call is None:
            return self.last
        return self.thread.call

    @property
    def position_ids(self) -> torch.Tensor | None:
        """As `Call`."""
        return self.now.position_ids

    @property
    def attention_mask(self) -> Any:
        """As `Call`."""
        return self.now.attention_mask

    @property
    def cu_seq_lens(self) -> torch.Tensor | None:
        """As `Call`."""
        return self.now.cu_seq_lens

    @property
    def has_cache(self) -> bool:
        """As `Call`."""
        return self.now.has_cache

    @property
    def notes(self) -> dict[Any, Any]:
        """As `Call`."""
        return self.now.notes

    @property
    def caller(self) -> nn.Module | None:
        """The module that was called from outside, while it runs in this thread."""
        if torch.compiler.is_compiling() or self.last is self.compiled:
            return self.last.caller
        call = self.thread.call
        if call is None or call.caller is None:
            return None
        # Hooks do not hear of a KeyboardInterrupt, so what says that a call runs is its frame.
        frame, wanted = sys._getframe(), self.thread.frame
        while frame is not None and frame is not wanted:
            frame = frame.f_back
        if frame is None:
            call.caller = self.thread.frame = None
        return call.caller

    def follow(self, model: PreTrainedModel) -> None:
        """Record every call of `model` from now on."""
        for module in find_entrances(model):
            arguments = inspect.signature(module.forward).parameters
            self.places[type(module)] = {name: place for place, name in enumerate(arguments)}
        self.handles = follow(model, self._before, self._after)

    def leave(self) -> None:
        """Stop recording calls."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @property
    def are_counted(self) -> bool:
        """Whether the model that runs was called without position_ids: it then counts every token of the row, so what
        a layer gets says nothing about documents."""
        return self.caller is not None and self.position_ids is None

    def positions(self, more: dict[str, Any]) -> torch.Tensor | None:
        """(1 or B, S) positions, from the arguments of a layer or of the model."""
        given = more.get("position_ids")
        return self.position_ids if given is None else text_positions(given)

    def boundaries(self, more: dict[str, Any]) -> torch.Tensor | None:
        """Cumulative lengths of the documents, from the arguments of a layer or of the model."""
        given = more.get("cu_seq_lens_q")
        return self.cu_seq_lens if given is None else given

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Hook: a followed module is called."""
        if kwargs is None:  # torch drops them if another hook removed this one during the same call
            return
        places = next((self.places[kind] for kind in type(module).__mro__ if kind in self.places), {})

        def given(name: str) -> Any:
            place = places.get(name, len(args))
            return args[place] if kwargs.get(name) is None and place < len(args) else kwargs.get(name)

        as_given, cu_seq_lens = given("position_ids"), kwargs.get("cu_seq_lens_q")
        position_ids = text_positions(as_given)
        if self.caller is None or self.caller is module:  # no module calls itself: the call was interrupted
            self._begin()
            now = self.now
            now.caller, now.position_ids, now.cu_seq_lens = module, position_ids, cu_seq_lens
            now.attention_mask = given("attention_mask")
            now.are_of_axes = has_axes_only(as_given)
            now.has_cache = any(kwargs.get(name) is not None for name in CACHE_ARGUMENTS)
            now.has_gradients, now.begins, now.forward, now.notes = torch.is_grad_enabled(), None, None, {}
            if not torch.compiler.is_compiling():
                now.begins = next_node()
                if not now.has_cache:
                    self._check(module, given, kwargs)
            settings = self.settings
            # Ranks that share a sequence each see a part of it, and must agree.
            is_comparable = settings.sharing is None and not now.has_cache
            tokens = given("input_ids") if is_comparable else None
            is_replica = getattr(module, "_is_replica", False)  # PyTorch's name for it
            settings.schedule.begin(module.training and settings.is_enabled, tokens, is_replica)
        else:  # another followed module called it, and may not pass on its arguments
            now = self.now
            if position_ids is not None:
                now.position_ids, now.are_of_axes = position_ids, has_axes_only(as_given)
            now.cu_seq_lens = now.cu_seq_lens if cu_seq_lens is None else cu_seq_lens

    def _begin(self) -> None:
        """Trust nothing that an earlier call left."""
        if torch.compiler.is_compiling():
            self.last = self.compiled
            return
        self.last = self.thread.call = Call()
        self.thread.frame, self.thread.running = sys._getframe(2), None

    def _check(self, module: nn.Module, given: Callable[[str], Any], kwargs: dict[str, Any]) -> None:
        """Refuse what the caller says of its rows if it does not fit them."""
        tokens = given("input_ids") if given("inputs_embeds") is None else given("inputs_embeds")
        if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            return
        try:
            check_lengths(self.cu_seq_lens, kwargs.get("cu_seq_lens_k"), *tokens.shape[:2])
            if module.training:
                check_padding(self.attention_mask, *tokens.shape[:2])
                self._check_documents(kwargs.get("seq_idx"), *tokens.shape[:2])
        except ValueError:
            self.now.caller = self.thread.frame = None  # the call ends here, before the hook that would note it
            raise

    def _check_documents(self, seq_idx: Any, batch: int, length: int) -> None:
        """Refuse documents that are said in a way that nobody reads, or twice and differently.

        Only a device knows its numbers, and asking costs time. A collator makes all rows alike, so the first are asked.
        """
        mask, positions, ends = self.attention_mask, self.position_ids, self.cu_seq_lens
        on_host = not any(isinstance(x, torch.Tensor) and not x.is_cpu for x in (mask, positions, ends))
        self.looks += 1
        if on_host or self.looks <= LOOKS:
            check_numbers_of_documents(mask, seq_idx, positions is not None or ends is not None)
            check_restarts(positions, ends, batch, length)

    def _after(self, module: nn.Module, args: Any = None, output: Any = None) -> None:
        """Hook: a followed module returns, or fails and has no output."""
        if self.caller is not module:
            return
        now = self.now
        now.caller = None
        if output is not None:
            self.settings.schedule.end()
        if torch.compiler.is_compiling():
            return
        self.thread.frame = None
        if now.forward is not None:
            now.forward.hold(output)

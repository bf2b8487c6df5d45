"""Layers with a state along the sequence (Mamba, linear attention, short convolutions), in packed and padded rows.

Such a layer reads a row from left to right and knows no documents. So the documents of a packed row are given to it as
rows of their own, and what it computes is put back in their places. Padding stands only behind a document then, where
no token of it is seen. This needs no kernel that knows borders between documents, and gives what the documents give
alone. The hooks of a model's layers do it; `settings` puts them there with those of `inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.utils import logging

from peft_longlora.architecture import find_state_layers
from peft_longlora.attention.inputs import ModelInputs
from peft_longlora.attention.lengths import OF_WHOLE_ROWS
from peft_longlora.attention.mask import S2Mask
from peft_longlora.attention.pending import Forward, Forwards

if TYPE_CHECKING:
    from peft_longlora.attention.settings import AttentionSettings

logger = logging.get_logger(__name__)

# Arguments that say where the documents of a whole row are; wrong for documents in rows of their own.
NOT_PASSED_ON = (*OF_WHOLE_ROWS, "cu_seqlens")


@dataclass(frozen=True, eq=False)
class Apart:
    """The documents of a (B, S) batch as rows of their own, in one or more batches of documents of similar length.

    Attributes:
        batch, length: B and S, tokens.
        tokens: for each batch of documents, (documents, longest) indices of flattened tokens; B * S at places behind a
            shorter document.
        places: (B * S,) the place of each token among the places of all batches; for padding, their number.
    """

    batch: int
    length: int
    tokens: tuple[torch.Tensor, ...]
    places: torch.Tensor

    @classmethod
    def of(cls, mask: S2Mask, positions: torch.Tensor | None, is_at_once: bool = False) -> Apart | None:
        """The plan of a batch; None if each row is one document with padding only behind it.

        A batch holds documents of more than half the length of its longest, so that at most half of it is empty; or
        all of them, if the layer must run once.
        """
        documents: dict[tuple[int, int], list[torch.Tensor]] = {}
        is_plain = True
        for start, tokens, number in mask.runs(positions):
            row, place = divmod(start, mask.length)
            if number:
                is_plain = is_plain and not place
                documents.setdefault((row, number), []).append(torch.arange(start, start + tokens))
        if is_plain:
            return None
        # Padding inside a document is left out, as in attention.
        batches: list[list[torch.Tensor]] = []
        for one in sorted(map(torch.cat, documents.values()), key=len, reverse=True):
            if batches and (is_at_once or len(one) * 2 > len(batches[-1][0])):
                batches[-1].append(one)
            else:
                batches.append([one])
        nothing, device = mask.batch * mask.length, mask.device
        tokens = [nn.utils.rnn.pad_sequence(one, batch_first=True, padding_value=nothing) for one in batches]
        flat = torch.cat([x.flatten() for x in tokens])
        places = torch.full((nothing + 1,), len(flat)).scatter_(0, flat, torch.arange(len(flat)))
        return cls(mask.batch, mask.length, tuple(x.to(device) for x in tokens), places[:nothing].to(device))

    def arrange(self, x: Any, tokens: torch.Tensor) -> Any:
        """A layer's argument for a batch of documents: (1 or B, S, ...) -> (documents, longest, ...), 0 behind them."""
        if isinstance(x, tuple | list):
            return type(x)(self.arrange(one, tokens) for one in x)
        if not isinstance(x, torch.Tensor):
            return None if isinstance(x, Cache) else x
        if x.dim() < 2 or x.shape[1] != self.length or x.shape[0] not in (1, self.batch):
            return x
        flat = x.expand(self.batch, *x.shape[1:]).flatten(0, 1)
        flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        return flat[tokens.to(x.device)]  # layers may be on several devices

    def restore(self, outputs: list[Any]) -> Any:
        """What a layer gave for each batch of documents as the output for (B, S) tokens, 0 at padding.

        Raises: NotImplementedError: it gave something else than one vector for each token.
        """
        if isinstance(outputs[0], tuple):
            first, *others = zip(*outputs, strict=True)
            return (self.restore(list(first)), *(self._restore_or_none(list(one)) for one in others))
        if not self._is_of_tokens(outputs):
            raise NotImplementedError(
                "A layer with a state along the sequence does not give one vector for each token, so this package "
                "cannot keep the documents of a packed row apart in it. Give each document a row of its own "
                "(packing=False), without padding before it."
            )
        flat = torch.cat([x.flatten(0, 1) for x in outputs])
        flat = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        return flat[self.places.to(flat.device)].unflatten(0, (self.batch, self.length))

    def _restore_or_none(self, outputs: list[Any]) -> Any:
        """Further outputs: a state of each document is none of the rows'."""
        return self.restore(outputs) if self._is_of_tokens(outputs) else None

    def _is_of_tokens(self, outputs: list[Any]) -> bool:
        shapes = zip(outputs, self.tokens, strict=True)
        return all(isinstance(x, torch.Tensor) and x.shape[:2] == tokens.shape for x, tokens in shapes)


class StateLayers:
    """The hooks on the layers of a model that hold a state along the sequence.

    Attributes:
        settings: of the model's attention: its inputs, whether they are enabled, and whether a module is sparse.
        forwards: those that layers may be recomputed for.
    """

    def __init__(self, settings: AttentionSettings):
        self.settings = settings
        self.forwards = Forwards()
        self.handles: list[RemovableHandle] = []

    @property
    def running(self) -> tuple[nn.Module, Apart, tuple[Any, ...], dict[str, Any]] | None:
        """The layer that this thread runs on documents apart, their plan, and the arguments of the whole row."""
        return self.settings.inputs.thread.running

    def follow(self, model: nn.Module) -> None:
        """Keep documents apart in every call of these layers from now on."""
        for module in find_state_layers(model).values():
            self.handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))

    def leave(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.forwards = [], Forwards()

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook: a layer is called. It gets the first batch of documents."""
        inputs, running = self.settings.inputs, self.running
        if running is not None and module is not running[0] and any(one is module for one in running[0].modules()):
            return None
        inputs.thread.running = None  # a layer that was interrupted leaves it
        given = [*args, *kwargs.values()]
        cache = next((x for x in given if isinstance(x, Cache)), None)
        if cache is not None and inputs.has_cache:
            _refuse_without_states(cache)
            return None
        is_read = cache is not None and not self.settings.is_sparse(module.training)
        if is_read and inputs.attention_mask is not None:  # a prompt to go on from
            return None
        if any(isinstance(x, S2Mask) for x in given):  # it computes with the mask of attention
            return None
        forward = self._forward(module, next(x for x in given if isinstance(x, torch.Tensor)))
        if forward is None or not forward.is_enabled:
            return None
        kwargs = {name: x for name, x in kwargs.items() if name not in NOT_PASSED_ON}
        if forward.plan is None:
            return args, kwargs
        if is_read:
            _leave_without_states(cache)
        inputs.thread.running = module, forward.plan, args, kwargs
        return self._arranged(0)

    def _forward(self, module: nn.Module, hidden_states: torch.Tensor) -> Forward | None:
        """The forward that a layer runs in, or is recomputed for; None for a layer that is called by hand.

        Raises: RuntimeError: as `Forwards.of_recomputation`.
        """
        inputs, shape = self.settings.inputs, tuple(hidden_states.shape[:2])
        if inputs.caller is None:
            return self.forwards.of_recomputation(shape)
        call = inputs.now
        if call.forward is None:
            plan = None
            if self.settings.is_enabled:
                # DeepSpeed ZeRO-3 gathers weights in each run of a layer, so all ranks must run it equally often.
                is_at_once = any(hasattr(weight, "ds_id") for weight in module.parameters())
                plan = _plan_of(inputs, *shape, hidden_states.device, is_at_once)
            call.forward = Forward(plan, self.settings.is_enabled, shape, call.begins)
            if call.has_gradients:
                self.forwards.add(call.forward)
        return call.forward

    def _arranged(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _, apart, args, kwargs = self.running
        tokens = apart.tokens[batch]
        return apart.arrange(args, tokens), {name: apart.arrange(x, tokens) for name, x in kwargs.items()}

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook: the layer returns, or fails. It is called again for the other batches of documents."""
        if self.running is None or self.running[0] is not module:
            return None
        try:
            if output is None:  # it failed
                return None
            apart, outputs = self.running[1], [output]
            for batch in range(1, len(apart.tokens)):
                more_args, more_kwargs = self._arranged(batch)
                outputs.append(module.forward(*more_args, **more_kwargs))
            return apart.restore(outputs)
        finally:
            self.settings.inputs.thread.running = None


WITHOUT_STATES = "s2_without_states"


def _leave_without_states(cache: Cache) -> None:
    """A packed row in evaluation: the cache that the model made holds no state of its documents."""
    setattr(cache, WITHOUT_STATES, True)
    logger.warning_once(
        "A row of several documents is evaluated, and each is computed as if it were alone. The cache that this "
        "forward gives cannot be used to go on. Give use_cache=False."
    )


def _refuse_without_states(cache: Cache) -> None:
    """Raises: ValueError: a cache of a packed row."""
    if getattr(cache, WITHOUT_STATES, False):
        raise ValueError(
            "This cache comes from a row of several documents, so it holds no state to go on from. Give the document "
            "to go on from a row of its own."
        )


# Kinds of layers, as configs name them, that attend and so see documents through their mask.
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}


def refuse_unfollowed(settings: AttentionSettings, mask: S2Mask, positions: torch.Tensor | None) -> None:
    """Refuse packed rows in a model that was only loaded with "s2_attn": nothing follows its other layers.

    Raises: NotImplementedError.
    """
    others = set(getattr(settings.config, "layer_types", None) or ()) - ATTENDING
    if not others or settings.inputs.handles:
        return
    if mask.is_packed(positions):
        raise NotImplementedError(
            f"This model has layers of the kind {', '.join(sorted(others))}, which know no documents, and got a row of "
            f"several. Call configure_attention(model) or add a LongLoraConfig adapter: then each document is computed "
            f"as if it were alone."
        )


def _plan_of(inputs: ModelInputs, batch: int, length: int, device: torch.device, is_at_once: bool) -> Apart | None:
    given = inputs.attention_mask
    is_padding = isinstance(given, torch.Tensor) and given.shape == (batch, length)
    arguments = dict(batch_size=batch, q_length=length, kv_length=length, device=device)
    mask = S2Mask({**arguments, "attention_mask": given if is_padding else None})
    positions = inputs.position_ids if inputs.cu_seq_lens is None else mask.positions(inputs.cu_seq_lens)
    if positions is None and not is_padding:
        return None
    return Apart.of(mask, positions, is_at_once)

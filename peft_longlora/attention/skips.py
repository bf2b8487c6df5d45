"""Positions that skip: while a model trains in groups ("local"), each group sees the distances of the whole window.

Inside a group positions begin at 0, and from a random token of it on they are farther away, by a random number that the
window has room for. Only RoPE is told so: a jump in the model's own positions would begin a document. Hooks on the
rotary modules do it; `settings` puts them there with those of `inputs`, and `schedule` says in which forwards.

Source: PoSE, arXiv:2309.10400, which gives a short row the positions of a long one; here each group of a long row.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from peft_longlora.architecture import (
    counts_tokens,
    find_attention_modules,
    find_rotary_modules,
    is_local_layer,
)
from peft_longlora.attention.mask import S2Mask
from peft_longlora.kernels.groups import positions_in_documents
from peft_longlora.rope.absent import is_positionless
from peft_longlora.rope.parameters import base_rope, follows_longest, window_of

if TYPE_CHECKING:
    from peft_longlora.attention.settings import AttentionSettings

NOTE = "skips"  # of the current call: what `draw` gave
_WORD = 0xFFFFFFFF


class Skips:
    """The hooks on the rotary modules of a model.

    Attributes:
        settings: of the model's attention.
    """

    def __init__(self, settings: AttentionSettings):
        self.settings = settings
        self.handles: list[RemovableHandle] = []

    def follow(self, model: nn.Module) -> None:
        """Let positions skip from now on, if the settings say so. Call it again if the model gets a rotary module."""
        self.leave()
        if self.settings.schedule.skip_positions:
            for module in find_rotary_modules(model):
                self.handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))

    def leave(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @property
    def are_on(self) -> bool:
        """Whether positions skip in the forward that runs."""
        schedule, inputs = self.settings.schedule, self.settings.inputs
        is_on = schedule.skip_positions and schedule.is_scheduled and not schedule.is_dense
        # With cached tokens in front layers are dense. Who calls a part of a model by hand gets what they ask for.
        return is_on and self.settings.is_sparse(True) and not inputs.has_cache and inputs.caller is not None

    def refuse_dense(self, module: nn.Module) -> None:
        """Refuse a layer that attends over the borders of groups in a forward whose positions skip.

        Raises: ValueError.
        """
        if self.are_on:
            name, number = type(module).__name__, getattr(module, "layer_idx", None)
            state = "training" if module.training else "evaluation"
            raise ValueError(
                f"skip_positions=True: {name} (layer_idx={number}, in {state} mode) attends densely in a forward whose "
                f"positions skip, so it would see positions go back where a group begins. Call model.train() for the "
                f"whole model (to freeze a layer, use requires_grad_(False)), or leave skip_positions out."
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Hook: RoPE is computed for the positions of a forward."""
        return None if kwargs is None or not self.are_on else self._replace(module, args, kwargs)

    @torch.compiler.disable(reason="positions skip by the number of the forward, which would be compiled in")
    def _replace(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a rotary module, with positions that skip."""
        names = _arguments(_kind(module))
        place = names.index("position_ids")
        is_named = "position_ids" in kwargs
        given = kwargs["position_ids"] if is_named else args[place]
        moved = self._moved(module, args[0] if args else kwargs[names[0]], given)
        if is_named:
            return args, {**kwargs, "position_ids": moved}
        return (*args[:place], moved, *args[place + 1 :]), kwargs

    def _moved(self, module: nn.Module, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """(B, S) or (axes, B, S) positions that skip, drawn once a forward.

        Args:
            x: (B, S, hidden) what RoPE is computed for. given: (1 or B, S) or (axes, 1 or B, S) its positions.
        """
        settings, notes = self.settings, self.settings.inputs.notes
        if NOTE not in notes:
            check_frequencies(settings.config)
            if x.dim() != 3 or given.shape[-1] != x.shape[1]:
                raise NotImplementedError(
                    f"skip_positions=True: {type(module).__name__} got positions of shape {tuple(given.shape)} for "
                    f"{tuple(x.shape)}, not one for each token. Leave skip_positions out."
                )
            mask, positions = self._documents(*x.shape[:2], given.device)
            first, before = 0, 0
            if settings.sharing is not None:
                first, before = settings.sharing.place(mask, positions, settings.group_size)
            notes[NOTE] = draw(
                mask.segment_ids(positions),
                settings.group_size,
                window_of(settings.config),
                settings.schedule.number,
                first,
                before,
            )
        positions, moves = (tensor.to(given.device) for tensor in notes[NOTE])
        return positions if given.dim() == 2 else given + moves

    def _documents(self, batch: int, length: int, device: torch.device) -> tuple[S2Mask, torch.Tensor | None]:
        """What tells the documents of a forward, as attention finds them: padding, and positions that restart."""
        inputs = self.settings.inputs
        padding, ends = inputs.attention_mask, inputs.boundaries({})
        if padding is not None and not (isinstance(padding, torch.Tensor) and padding.dim() == 2):
            raise ValueError(
                f"skip_positions=True needs documents that position_ids or a 2-D attention_mask describe, and "
                f"attention_mask is {type(padding).__name__} of shape {getattr(padding, 'shape', None)}. Give a 2-D "
                f"mask (1 = token, 0 = padding), or train dense within `with use_attention(model, 'dense'):`."
            )
        arguments = dict(batch_size=batch, q_length=length, kv_length=length, device=device, attention_mask=padding)
        if ends is not None:
            return S2Mask(arguments), positions_in_documents(ends, batch, length)
        return S2Mask(arguments), None if inputs.are_counted else inputs.position_ids


def draw(
    segment_ids: torch.Tensor, group_size: int, window: int, number: int, first: int = 0, before: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that begin at 0 in each group and skip once, at a random token by a random number.

    The draws are a function of the forward's number and of the place of a group among all tokens. So they are the same
    on all ranks, also for a group that lies on two of them, and in a run that was resumed. Nothing waits for the
    device. Ranks with different data draw alike too, as they do for dropout where a Trainer seeds them alike. A rank's
    number would not do instead: it does not tell which ranks have the same data (tensor and sequence parallelism), and
    those must draw alike.

    Args:
        segment_ids: (B, S) int: 0 = padding, otherwise the document's number, which grows along the row.
        group_size: G in tokens. window: tokens; every position is below it.
        number: of the forward.
        first, before: for a stretch of a sequence that ranks share: the tokens before it, and those of them that belong
            to its first document.

    Returns:
        Two tensors (B, S) int64: the positions, and how far each is from the place of its token, which is counted from
        the document's start, without padding. Axes of images and videos move as far.

    Example: one document of 6 tokens, G = 4, window = 8. If the first group skips 3 at its third token and the second
        one does not within two tokens, the positions are 0 1 5 6 0 1, and they moved by 0 0 3 3 -4 -4.
    """
    is_real = segment_ids > 0
    index = torch.arange(segment_ids.numel(), device=segment_ids.device).view(segment_ids.shape) + first
    last = nn.functional.pad(segment_ids.cummax(1).values[:, :-1], (1, 0))
    begins = is_real & (segment_ids > last)
    count = is_real.cumsum(1) - 1
    ahead = before * (begins.cumsum(1) <= 1)  # of the first document, on earlier ranks
    place = count - (count * begins).cummax(1).values + ahead
    group, inside = place // group_size, place % group_size
    start = torch.where(begins, index, first).cummax(1).values - ahead
    drawn = _mix(((start + group * group_size) & _WORD) ^ _mix(number & _WORD))
    where = _mix(drawn ^ 1) % group_size
    skip = _mix(drawn ^ 2) % max(1, window - group_size + 1)
    skips = skip * (inside >= where)
    return inside + skips, skips - group * group_size


def _mix(x: Any) -> Any:
    """A whole number below 2 ** 32 for another one, as if drawn. The products fit 63 bits, so tensors do not overflow.

    Source: the constants of github.com/skeeto/hash-prospector.
    """
    x = (x + 0x9E3779B9) & _WORD  # so that 0 is not drawn for 0
    x = (((x >> 16) ^ x) * 0x21F0AAAD) & _WORD
    x = (((x >> 15) ^ x) * 0x735A2D97) & _WORD
    return (x >> 15) ^ x


def check_skips(model: PreTrainedModel, group_size: int) -> None:
    """Refuse a model whose positions cannot skip inside groups.

    Raises: NotImplementedError. ValueError: a window that is no longer than a group.
    """
    config = model.config.get_text_config()
    rotary, attending = find_rotary_modules(model), find_attention_modules(model).values()
    inside = {id(part) for module in attending for part in module.modules()}
    reason = None
    if is_positionless(model):
        reason = "has full attention without RoPE, so there are no positions to move"
    elif any(is_local_layer(module, config) for module in attending):
        reason = "has layers with a window or chunks of their own, which reach over the border of a group: there they"
        reason += " would see positions go back. A window may be switched off when the model is loaded"
        reason += " (sliding_window=None)"
    elif any(id(module) in inside or "position_ids" not in _arguments(_kind(module)) for module in rotary):
        reason = "computes RoPE inside its layers, or from something else than position_ids"
    elif any(counts_tokens(type(module)) for module in attending) or "llama_4_scaling_beta" in base_rope(config):
        reason = "scales its queries by their place in the row, which skips do not move"
    if reason:
        raise NotImplementedError(
            f"skip_positions=True: {config.model_type} {reason}. Leave skip_positions out, or use a model with RoPE "
            f"and full attention in every layer (llama, qwen3, ...)."
        )
    check_frequencies(config)
    if (window := window_of(config)) <= group_size:
        raise ValueError(
            f"skip_positions=True has no effect: a group of group_size={group_size} tokens is as long as the window "
            f"({window} tokens), so there is no room to skip. Use smaller groups, or a longer window (context_length "
            f"of LongLoraConfig; scale_rope before configure_attention)."
        )


def check_frequencies(config: PreTrainedConfig) -> None:
    """Refuse a RoPE that a position which skips would give other frequencies. Raises: NotImplementedError."""
    if follows_longest(config):
        raise NotImplementedError(
            "skip_positions=True: rope_type 'dynamic' and 'longrope' take their frequencies from the longest position "
            "of a forward, which skips move. Use rope_type 'yarn', 'linear', 'ntk', 'llama3' or 'learned', or leave "
            "skip_positions out."
        )


def _kind(module: nn.Module) -> type[nn.Module]:
    """A rotary module's class, without what was mixed into it (`rope.learned`)."""
    return getattr(module, "original_class", type(module))


@cache
def _arguments(kind: type[nn.Module]) -> list[str]:
    """The names of a forward's arguments, in order."""
    return list(inspect.signature(kind.forward).parameters)[1:]

"""One call of an attention layer, and everything that follows from it.

`forward` makes it; `dense` reads it, and sequence's `layer` if ranks share the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_longlora.architecture import has_chunks, is_causal_layer
from peft_longlora.attention.local import Local, cuts_of, find_local
from peft_longlora.attention.mask import S2Mask
from peft_longlora.attention.settings import AttentionSettings
from peft_longlora.kernels.cuts import Cuts, plan_tensors
from peft_longlora.kernels.kernel import Options
from peft_longlora.kernels.patterns import BLOCK_PATTERNS


@dataclass(frozen=True)
class LayerCall:
    """The arguments that transformers passes to attention in one layer.

    Attributes:
        module: the layer. settings: how it attends.
        query: (B, H, S, D). key: (B, H_kv, T, D) with the cache in front. value: (B, H_kv, T, D_v).
        mask: the result of `s2_mask`, the user's 4-D mask, or None.
        options: scaling, dropout, softcap, sinks, and the backend of the settings.
        more: further arguments of the architecture: position_ids, sliding_window, is_causal ...
    """

    module: nn.Module
    settings: AttentionSettings
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: S2Mask | torch.Tensor | None
    options: Options
    more: dict[str, Any]

    @property
    def cached(self) -> int:
        """The number of cached tokens in front."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def is_local(self) -> bool:
        """Whether the layer has its own window or chunks, which it keeps."""
        is_local = isinstance(self.mask, S2Mask) and self.mask.is_local
        return is_local or self.more.get("sliding_window") is not None

    @property
    def is_causal(self) -> bool:
        """Whether no token sees a later one."""
        is_causal = not isinstance(self.mask, S2Mask) or self.mask.is_causal
        return is_causal and is_causal_layer(self.module) and self.more.get("is_causal") is not False

    @property
    def is_sparse(self) -> bool:
        """Whether the model's mode asks for S2-Attn in this layer. Recomputation uses the mode of the forward."""
        return self.once("is sparse", lambda: self.settings.is_sparse(self.module.training))

    @property
    def pattern(self) -> str:
        """The pattern of this layer if it is sparse; "full" in a dense layer and in a dense forward of
        `dense_every`."""
        if self.once("is dense", lambda: self.settings.schedule.is_dense):
            return "full"
        return self.settings.pattern_of(self.module)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Facts that this layer finds at its first run in a forward, and that also hold when it is recomputed.

        Gradient checkpointing calls a layer again in the backward, with the same mask. The mode may have changed by
        then, and there may have been other forwards. A layer without a mask uses the facts of the model's last call.
        """
        if torch.compiler.is_compiling():
            return self._once_in_mode(name, make) if isinstance(self.mask, S2Mask) else make()
        key, inputs = (name, getattr(self.module, "layer_idx", None)), self.settings.inputs
        if isinstance(self.mask, S2Mask):
            return self.mask.once(key, lambda: self._once_in_mode(name, make))
        notes = inputs.notes if self.mask is None else self.mask.__dict__.setdefault("s2_notes", {})
        if inputs.caller is not None:  # a forward; the mask may come from an earlier one
            notes[key] = make()
        return notes[key] if key in notes else make()

    def _once_in_mode(self, name: str, make: Callable[[], Any]) -> Any:
        """The same by the layer's mode: compiled code that knows the number of a layer serves no other layer.

        When a layer is recomputed, what was found for its mode holds. If nothing was, the mode has changed since.
        """
        found, mode = self.mask.once(("by mode", name), dict), self.module.training
        if not found or self.settings.inputs.caller is not None:
            found[mode] = make()
        return found[mode] if mode in found else found[not mode]

    @property
    def positions(self) -> torch.Tensor | None:
        """(1 or B, S) positions that restart where a document starts, from cumulative lengths if they are given."""
        inputs = self.settings.inputs
        if (boundaries := inputs.boundaries(self.more)) is not None:
            return self.s2_mask.positions(boundaries)
        # A layer that is recomputed, after the call, cannot tell the model's own count from positions that were given.
        return None if self.once("is counted", lambda: inputs.are_counted) else inputs.positions(self.more)

    @property
    def order(self) -> torch.Tensor | None:
        """The order in which tokens are attended to, if it differs from the row's (`S2Mask.order`)."""
        return self.mask.order(self.positions) if isinstance(self.mask, S2Mask) else None

    def cuts(self, pattern: str) -> Cuts:
        """Where attention with a pattern is cut, computed once a forward."""
        mask = self.s2_mask
        if torch.compiler.is_compiling():
            return self._compiled_cuts(pattern, mask)
        return mask.once(("cuts", pattern), lambda: self._cuts(pattern, mask))

    def _cuts(self, pattern: str, mask: S2Mask) -> Cuts:
        size, positions = self.settings.group_size, self.positions
        if pattern in BLOCK_PATTERNS:
            return Cuts.by_blocks(mask.blocks(size, pattern, positions, self.settings.chosen_blocks))
        # A ready plan is kept in the mask. It must not refer to the mask: that cycle would keep memory until
        # collection.
        return Cuts.of(mask.groups(size, pattern, positions))

    def local(self, positions: torch.Tensor | None) -> Local | None:
        """The layer's own window or chunks, if a kernel can run them."""
        if not isinstance(self.mask, S2Mask):
            return None
        what = self.module, self.settings.config
        # Compiled code takes the mask, which says the same, but for chunks of documents: it counts them from the row.
        if torch.compiler.is_compiling() and (positions is None or not has_chunks(*what)):
            return None
        key = "local", positions is None
        local = self.mask.once(key, lambda: find_local(self.mask, positions, has_chunks(*what)))
        told = self.more.get("sliding_window")
        return None if local and told is not None and local != ("window", told) else local

    def local_cuts(self, positions: torch.Tensor | None) -> Cuts | None:
        """Where the attention of a layer with its own window or chunks is cut; None if only its dense mask says it."""
        local = self.local(positions)
        if local is None:
            return None
        return self.mask.once(("local cuts", positions is None), lambda: cuts_of(self.mask, positions, local))

    def _compiled_cuts(self, pattern: str, mask: S2Mask) -> Cuts:
        if pattern in BLOCK_PATTERNS:
            return self._cuts(pattern, mask)
        size, positions = self.settings.group_size, self.positions

        def make_tensors() -> tuple[torch.Tensor, torch.Tensor]:
            ids, order = mask.segment_ids(positions), mask.order(positions)
            ids = ids if order is None else ids.gather(1, order)
            where = ids, *ids.shape, size, pattern, self.query.device
            return mask.once(f"tensors of {pattern}", lambda: plan_tensors(*where))

        return Cuts(mask.batch, mask.length, partial(mask.groups, size, pattern, positions), make_tensors)

    @property
    def s2_mask(self) -> S2Mask:
        """The mask. If the model makes none, there is no padding and there are no packed rows."""
        if isinstance(self.mask, S2Mask):
            return self.mask
        batch, _, length, _ = self.query.shape
        return S2Mask(dict(batch_size=batch, q_length=length, device=self.query.device))

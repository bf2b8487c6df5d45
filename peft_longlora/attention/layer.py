"""One call of an attention layer, and what follows from it, said once.

Made by `forward`; read by `dense`, and by sequence's `layer` if ranks share the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_longlora.architecture import is_causal_layer
from peft_longlora.attention.mask import S2Mask
from peft_longlora.attention.settings import AttentionSettings
from peft_longlora.kernels.cuts import Cuts, plan
from peft_longlora.kernels.groups import BLOCK_PATTERNS
from peft_longlora.kernels.kernel import Options


@dataclass(frozen=True)
class LayerCall:
    """What transformers hands to attention in one layer.

    Attributes:
        module: the layer. settings: how it attends.
        query: (B, H, S, D). key: (B, H_kv, T, D) with the cache in front. value: (B, H_kv, T, D_v).
        mask: what `s2_mask` returned, a 4-D mask of the user's, or None.
        options: scaling, dropout, softcap, sinks, and the backend of the settings.
        more: what else the architecture passes: position_ids, sliding_window, is_causal ...
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
        """How many tokens of a cache stand in front."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def is_local(self) -> bool:
        """Whether the layer has a window or chunks of its own, which it keeps."""
        is_local = isinstance(self.mask, S2Mask) and self.mask.is_local
        return is_local or self.more.get("sliding_window") is not None

    @property
    def is_causal(self) -> bool:
        """Whether no token sees a later one."""
        is_causal = not isinstance(self.mask, S2Mask) or self.mask.is_causal
        return is_causal and is_causal_layer(self.module) and self.more.get("is_causal") is not False

    @property
    def is_sparse(self) -> bool:
        """Whether the model's mode asks for S2-Attn in this layer; its recomputation is what the forward was."""
        return self.once("is sparse", lambda: self.settings.is_sparse(self.module.training))

    @property
    def pattern(self) -> str:
        """The pattern of this layer if it is sparse; "full" in a dense layer, and in one forward of `dense_every`."""
        if self.once("is dense", lambda: self.settings.schedule.is_dense):
            return "full"
        return self.settings.pattern_of(self.module)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What this layer finds out at its first run in a forward, and still holds when it is recomputed.

        Gradient checkpointing calls a layer again during the backward, with the same mask: in a mode that may have
        changed, and after other forwards. A layer that gets no mask has what the model's last call left.
        """
        key, inputs = (name, getattr(self.module, "layer_idx", None)), self.settings.inputs
        if isinstance(self.mask, S2Mask):
            return self.mask.once(key, make)
        if torch.compiler.is_compiling():
            return make()
        notes = inputs.notes if self.mask is None else self.mask.__dict__.setdefault("s2_notes", {})
        if inputs.caller is not None:  # a forward; the mask may have served others before
            notes[key] = make()
        return notes[key] if key in notes else make()

    @property
    def positions(self) -> torch.Tensor | None:
        """(1 or B, S) positions that restart where a document starts, from cumulative lengths if they are given."""
        boundaries = self.settings.inputs.boundaries(self.more)
        return self.settings.inputs.positions(self.more) if boundaries is None else self.s2_mask.positions(boundaries)

    @property
    def order(self) -> torch.Tensor | None:
        """In which order tokens are attended to, if not as they stand (`S2Mask.order`)."""
        return self.mask.order(self.positions) if isinstance(self.mask, S2Mask) else None

    def cuts(self, pattern: str) -> Cuts:
        """Where attention by a pattern is cut, worked out once a forward."""
        mask = self.s2_mask
        if torch.compiler.is_compiling():
            return self._compiled_cuts(pattern, mask)
        return mask.once(("cuts", pattern), lambda: self._cuts(pattern, mask))

    def _cuts(self, pattern: str, mask: S2Mask) -> Cuts:
        size, positions = self.settings.group_size, self.positions
        if pattern in BLOCK_PATTERNS:
            return Cuts.by_blocks(mask.blocks(size, pattern, positions, self.settings.chosen_blocks))
        # A plan that is ready: kept in the mask, it must not hold the mask, whose memory would wait for the collector.
        return Cuts.of(mask.groups(size, pattern, positions))

    def _compiled_cuts(self, pattern: str, mask: S2Mask) -> Cuts:
        if pattern in BLOCK_PATTERNS:
            return self._cuts(pattern, mask)
        size, positions = self.settings.group_size, self.positions

        def make_tensors() -> tuple[torch.Tensor, torch.Tensor]:
            ids, order = mask.segment_ids(positions), mask.order(positions)
            ids = ids if order is None else ids.gather(1, order)
            return mask.once(f"tensors of {pattern}", lambda: plan(ids, *ids.shape, size, pattern, self.query.device))

        return Cuts(mask.batch, mask.length, partial(mask.groups, size, pattern, positions), make_tensors)

    @property
    def s2_mask(self) -> S2Mask:
        """The mask; a model that makes none has no padding and no packed rows."""
        if isinstance(self.mask, S2Mask):
            return self.mask
        batch, _, length, _ = self.query.shape
        return S2Mask(dict(batch_size=batch, q_length=length, device=self.query.device))

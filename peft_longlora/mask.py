"""What attention layers must know of one forward: who is padding, and who belongs to which document.

transformers calls `s2_mask` once a forward and kind of layer (full, sliding) and hands what it returns to every layer.
It returns an `S2Mask`: neither the S x S mask of dense attention nor the groups of sparse attention are made before a
layer asks, and both are made once. Called through transformers' AttentionMaskInterface; read by `attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from peft_longlora.groups import Groups, find_documents, plan_groups

# A document number that no document has: the mask lets a token see a later one.
BIDIRECTIONAL = -1


class S2Mask:
    """The mask of one forward, before it is known whether a layer is sparse or dense.

    Attributes:
        batch, length: B and S, tokens.
        is_local: whether it belongs to layers with a window or chunks of their own, which stay as they are.
        is_causal: False where transformers was told to let tokens see later ones.
        is_sparse: whether this forward is sparse; None until the first layer decides. Kept here and not asked of each
            layer, so that gradient checkpointing recomputes what the forward computed, whatever the model's mode is
            by then.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.batch: int = arguments["batch_size"]
        self.length: int = arguments["q_length"]
        self.is_local = arguments.get("local_size") is not None
        self.is_causal = "allow_is_bidirectional_skip" not in arguments
        self.is_sparse: bool | None = None
        self._arguments = arguments
        self._dense: dict[str, Any] = {}
        self._documents: list[tuple[int, int, int]] | None = None
        self._padding: torch.Tensor | None = None
        self._groups: dict[tuple[int, str], Groups] = {}

    def to(self, *args: Any, **kwargs: Any) -> S2Mask:
        """Itself: accelerate's hooks move what layers get, and each layer moves what it takes out of here."""
        return self

    def dense(self, implementation: str, device: torch.device) -> Any:
        """The mask that `implementation` ("sdpa", "flash_attention_2", ...) would have been given."""
        if implementation not in self._dense:
            self._dense[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self._arguments)
        mask = self._dense[implementation]
        return mask.to(device) if isinstance(mask, torch.Tensor) else mask

    def groups(self, group_size: int, pattern: str, position_ids: torch.Tensor | None = None) -> Groups:
        """The groups of this forward, made once for each (group_size, pattern).

        Args:
            group_size: G, tokens.
            pattern: "s2", "local" or "full".
            position_ids: (1 or B, S) as the layer got them: they restart where a document starts. transformers
                drops that information when it also gets a 2-D mask or a cache.

        Raises:
            NotImplementedError: the model's mask lets a token see a later one.
        """
        if (group_size, pattern) not in self._groups:
            if self._documents is None:
                self._find_documents(position_ids)
            self._groups[group_size, pattern] = plan_groups(
                self.batch, self.length, group_size, pattern, documents=self._documents, padding=self._padding
            )
        return self._groups[group_size, pattern]

    @torch.compiler.disable
    def _find_documents(self, position_ids: torch.Tensor | None) -> None:
        """Number the documents from the model's own mask rule, the padding mask and the positions.

        The rule says for any two indices whether one sees the other; two neighbours that do not are in two documents.
        Asking neighbours only keeps memory at O(S) and needs nothing but what every architecture gives.
        """
        device, padding_mask = self._arguments["device"], self._arguments.get("attention_mask")
        position = torch.arange(self.length, device=device)
        row = torch.arange(self.batch, device=device)[:, None]
        is_start = torch.zeros(self.batch, self.length, dtype=torch.bool, device=device)
        sees_later = torch.zeros_like(is_start)
        if not self._arguments.get("allow_is_causal_skip", True):  # else the rule is plain causality
            rule = self._arguments["mask_function"]
            left, right = position[None, :-1], position[None, 1:]
            is_start[:, 1:] |= ~rule(row, 0, right, left)
            sees_later[:, 1:] |= rule(row, 0, left, right)
        if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[-1] == self.length:
            is_start[:, 1:] |= (position_ids.diff(dim=-1) != 1).to(device)
        segment_ids = is_start.cumsum(1) + 1
        if padding_mask is not None:
            is_real = padding_mask.to(device=device, dtype=torch.bool)
            is_start[:, 1:] |= is_real[:, 1:] != is_real[:, :-1]
            segment_ids = (is_start.cumsum(1) + 1).masked_fill(~is_real, 0)
        segment_ids = segment_ids.masked_fill(sees_later & (segment_ids > 0), BIDIRECTIONAL)
        self._documents = find_documents(segment_ids)
        if any(number == BIDIRECTIONAL for _, _, number in self._documents):
            raise NotImplementedError(
                "This model's attention mask lets tokens see later ones (a prefix or an image, say), which groups "
                "cannot express. Train it with attention_pattern='full', or give it causal input only."
            )
        self._padding = segment_ids == 0


def s2_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Any:
    """transformers' mask function for `attn_implementation="s2_attn"`.

    Args:
        batch_size, q_length, kv_length: B, S and T, tokens.
        kwargs: the rest of what transformers hands to mask functions (masking_utils.create_causal_mask).

    Returns:
        An `S2Mask`. For static caches, whose masks `generate` makes outside the model and hands in ready, the 4-D
        tensor it expects: (B, 1, S, T) bool or None.
    """
    arguments = dict(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)
    offset = kwargs.get("q_offset", 0)
    # A static cache counts on the device, or (empty) has more room than tokens.
    if isinstance(offset, torch.Tensor) or offset + q_length < kv_length:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**arguments)
    return S2Mask(arguments)

"""Which tokens of a forward are padding, and which belong to which document.

transformers calls `s2_mask` once for each forward and kind of layer (full, sliding), and passes the result to every
layer. The result is an `S2Mask`. It makes the S x S mask of dense attention and the groups of sparse attention only
when a layer asks, and only once. transformers' AttentionMaskInterface calls it; `layer` reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks
from transformers.utils import logging

from peft_longlora.attention.ready import ReadyMask
from peft_longlora.kernels.blocks import BlockPlan
from peft_longlora.kernels.cuts import regular_groups, tensors_of
from peft_longlora.kernels.groups import (
    BIDIRECTIONAL,
    Groups,
    find_documents,
    plan_groups,
    positions_in_documents,
    refuse_bidirectional,
)

logger = logging.get_logger(__name__)


class S2Mask(ReadyMask):
    """The mask of one forward, before it is known whether a layer is sparse or dense.

    Attributes:
        batch, length: B and S, tokens.
        is_local: whether it belongs to layers with their own window or chunks, which are not changed.
        is_causal: False if transformers was told to let tokens see later ones, or if the model's rule does so.
        arguments: of transformers' mask functions.
    """

    def __init__(self, arguments: dict[str, Any]):
        self.batch: int = arguments["batch_size"]
        self.length: int = arguments["q_length"]
        self.is_local = arguments.get("local_size") is not None
        self.is_causal = "allow_is_bidirectional_skip" not in arguments
        self.arguments = arguments
        self._dense: dict[tuple[str, bool], Any] = {}
        self._made: dict[Any, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.arguments["device"]

    def dense(self, implementation: str, device: torch.device, position_ids: torch.Tensor | None = None) -> Any:
        """The mask that `implementation` ("sdpa", "flash_attention_2", ...) would have been given.

        Args:
            implementation: a transformers attention.
            device: where the layer computes.
            position_ids: (1 or B, S); they keep documents apart where transformers drops them: beside a 2-D mask or a
                cache, and in models that do not hand their positions to the mask. None: as transformers has it.
        """
        key = implementation, position_ids is not None
        if key not in self._dense:
            arguments = self._separated(position_ids)
            self._dense[key] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**arguments)
        mask = self._dense[key]
        return mask.to(device) if isinstance(mask, torch.Tensor) else mask

    def _separated(self, position_ids: torch.Tensor | None) -> dict[str, Any]:
        """The arguments of a mask function, with a rule that keeps documents apart."""
        if not self._has_positions(position_ids) or self.arguments["kv_length"] != self.length:
            return self.arguments
        # Only the device knows whether a position restarts. Layers with a window get a mask in any case; the others use
        # numbers that the groups of other layers need on the host too. Compiled code cannot ask, as in transformers.
        if not (self.is_local or torch.compiler.is_compiling()) and len(self.runs(position_ids)) <= self.batch:
            return self.arguments
        document, _ = self._number_documents(position_ids)
        rule = and_masks(self.arguments["mask_function"], lambda b, h, q, k: document[b, q] == document[b, k])
        return {**self.arguments, "mask_function": rule, "allow_is_causal_skip": False}

    def groups(self, group_size: int, pattern: str, position_ids: torch.Tensor | None = None) -> Groups:
        """The groups of this forward, made once for each (group_size, pattern).

        Args:
            group_size: G, tokens.
            pattern: one of `patterns.PATTERNS`.
            position_ids: (1 or B, S) as the layer got them; they restart where a document starts. (transformers drops
                this if it also gets a 2-D mask or a cache.) None: positions do not restart; then, without padding and
                with a causal rule, nothing is read from the device.

        Raises:
            NotImplementedError: the model's mask lets a token see a later one.
        """
        return self.once((group_size, pattern), lambda: self._make_groups(group_size, pattern, position_ids))

    @torch.compiler.disable
    def blocks(
        self, group_size: int, pattern: str, position_ids: torch.Tensor | None, chosen_blocks: int | None
    ) -> BlockPlan:
        """The plan of this forward for a pattern that sees blocks of keys; arguments and errors as `groups`."""
        if self._is_plain(position_ids):
            documents = [(row * self.length, self.length, 1) for row in range(self.batch)]
        else:
            documents = self.documents(position_ids)
            if (order := self.order(position_ids)) is not None:
                documents = find_documents(self.segment_ids(position_ids).gather(1, order))
        return BlockPlan.of(self.batch, self.length, documents, group_size, pattern, chosen_blocks)

    @torch.compiler.disable
    def _make_groups(self, group_size: int, pattern: str, position_ids: torch.Tensor | None) -> Groups:
        """Make the groups outside compiled code, so that no number of tokens is compiled in."""
        if self._is_plain(position_ids):  # known without reading from the device
            groups = regular_groups(self.batch, self.length, group_size, pattern)
        else:
            documents = self.documents(position_ids)
            ids = self.segment_ids(position_ids)
            if (order := self.order(position_ids)) is not None:
                ids = ids.gather(1, order)
                documents = find_documents(ids)
            groups = plan_groups(self.batch, self.length, group_size, pattern, documents=documents, padding=ids == 0)
        tensors_of(groups, self.arguments["device"])
        return groups

    def _is_plain(self, position_ids: torch.Tensor | None) -> bool:
        """Whether every row is one document without padding, because no argument says otherwise."""
        is_causal = self.arguments.get("allow_is_causal_skip", True)
        return is_causal and position_ids is None and self.arguments.get("attention_mask") is None

    def positions(self, cu_seq_lens: torch.Tensor) -> torch.Tensor:
        """(B, S) positions that restart where a document starts, from cumulative lengths."""
        return self.once("positions", lambda: positions_in_documents(cu_seq_lens, self.batch, self.length))

    def segment_ids(self, position_ids: torch.Tensor | None) -> torch.Tensor:
        """(B, S) int: 0 = padding, otherwise the document's number; `BIDIRECTIONAL` if a later token is seen."""

        def number() -> torch.Tensor:
            ids, sees_later = self._number_documents(position_ids)
            return ids.masked_fill(sees_later & (ids > 0), BIDIRECTIONAL)

        return self.once("segment_ids", number)

    def documents(self, position_ids: torch.Tensor | None) -> list[tuple[int, int, int]]:
        """The documents of this forward as `groups.find_documents` gives them.

        Raises: NotImplementedError: as `groups`.
        """
        documents = self.runs(position_ids)
        if any(number == BIDIRECTIONAL for _, _, number in documents):
            refuse_bidirectional()
        return documents

    @torch.compiler.disable
    def runs(self, position_ids: torch.Tensor | None) -> list[tuple[int, int, int]]:
        """Documents and padding, copied to the host once a forward."""
        if not self.batch or not self.length:
            return []
        return self.once("runs", lambda: find_documents(self.segment_ids(position_ids)))

    def is_packed(self, position_ids: torch.Tensor | None) -> bool:
        """Whether a row holds several documents."""

        def find() -> bool:
            documents = {(start // self.length, number) for start, _, number in self.runs(position_ids) if number}
            return len(documents) > len({row for row, _ in documents})

        return self.once("is packed", find)

    def has_padding_in_front(self, position_ids: torch.Tensor | None) -> bool:
        """Whether padding comes before the first document of a row."""

        def find() -> bool:
            return any(
                number == 0 and start % self.length == 0 and size < self.length
                for start, size, number in self.runs(position_ids)
            )

        return self.once("padding in front", find)

    def order(self, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        """(B, S) token indices with each row's padding at its end, if there is padding inside a document; otherwise
        None.

        A group consists of consecutive tokens, so such rows are attended to in this order. Compiled code cannot look
        into rows, and orders all rows that have a padding mask.
        """
        if self.arguments.get("attention_mask") is None:
            return None

        def find() -> torch.Tensor | None:
            if torch.compiler.is_compiling():
                return _padding_last(self.segment_ids(position_ids))
            return self._find_order(position_ids)

        return self.once("order", find)

    @torch.compiler.disable
    def _find_order(self, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        runs = self.runs(position_ids)
        numbers = [(start // self.length, number) for start, _, number in runs if number > 0]
        if len(set(numbers)) == len(numbers):
            return None
        logger.warning_once(
            "attention_mask has padding inside a document (0 between two 1). Those tokens are left out, and the "
            "document continues after them, but every layer must copy its tokens. If the mask was made as "
            "input_ids != pad_token_id and the pad token is the eos token, give the tokenizer its own pad token. "
            "To end a document there, give position_ids that restart."
        )
        return _padding_last(self.segment_ids(position_ids))

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """A value that layers derive from this mask: the first layer makes it, the others reuse it."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def whole_documents(self, position_ids: torch.Tensor | None = None) -> Groups | None:
        """The plan of dense attention by the model's own rule and by positions (see `dense`); None if a token may see a
        later one, or if a cache stands in front.
        """
        if not self.is_causal or self.is_local or self.arguments["kv_length"] != self.length:
            return None
        try:
            return self.groups(2, "full", position_ids) if self.order(position_ids) is None else None
        except NotImplementedError:
            self.is_causal = False
            return None

    def _has_positions(self, position_ids: torch.Tensor | None) -> bool:
        """Whether positions can show documents: they have one number for each token."""
        return position_ids is not None and position_ids.dim() == 2 and position_ids.shape[-1] == self.length

    def _number_documents(self, position_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Number the documents from the model's own mask rule, the padding mask and the positions.

        Returns: segment ids (B, S), 0 = padding; and (B, S) bool, True where the token before sees this one.

        The rule says for any two indices whether one sees the other. If two neighbours do not, they are in two
        documents. Only neighbours are checked, so memory is O(S), and every architecture has such a rule. A neighbour
        is the last token before that is not padding: padding inside a document does not end it, as in evaluation.
        """
        device, padding_mask = self.arguments["device"], self.arguments.get("attention_mask")
        row = torch.arange(self.batch, device=device)[:, None]
        here = torch.arange(self.length, device=device).expand(self.batch, -1)
        last = here
        if padding_mask is not None:
            is_real = padding_mask.to(device=device, dtype=torch.bool)
            last = torch.where(is_real, here, 0).cummax(1).values
        here, left = here[:, 1:], last[:, :-1]
        is_start = torch.zeros(self.batch, self.length, dtype=torch.bool, device=device)
        sees_later = torch.zeros_like(is_start)
        if not self.arguments.get("allow_is_causal_skip", True):  # else the rule is plain causality
            rule = self.arguments["mask_function"]
            is_start[:, 1:] |= ~rule(row, 0, here, left)
            sees_later[:, 1:] |= rule(row, 0, here - 1, here)
        if self._has_positions(position_ids):
            positions = position_ids.to(device).expand(self.batch, -1)
            before, after = positions.gather(1, left), positions.gather(1, left + 1)
            # If padding has positions, the positions of tokens count it too.
            is_start[:, 1:] |= positions[:, 1:] - before != torch.where(after - before == 1, here - left, 1)
        if padding_mask is None:
            return is_start.cumsum(1) + 1, sees_later
        return ((is_start & is_real).cumsum(1) + 1).masked_fill(~is_real, 0), sees_later


def _padding_last(segment_ids: torch.Tensor) -> torch.Tensor:
    """(B, S) token indices: each row's tokens in order, then its padding."""
    return torch.sort((segment_ids == 0).to(torch.uint8), dim=1, stable=True).indices


def s2_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Any:
    """transformers' mask function for `attn_implementation="s2_attn"`.

    Args:
        batch_size: B, rows.
        q_length: S, tokens.
        kv_length: T, tokens with those in the cache.
        kwargs: the other arguments of transformers' mask functions (masking_utils.create_causal_mask).

    Returns:
        An `S2Mask`. For static caches `generate` makes the masks outside the model; then it is the 4-D tensor that
        `generate` expects: (B, 1, S, T) bool or None.
    """
    if isinstance(kwargs.get("attention_mask"), S2Mask):  # `generate` made it ahead
        return kwargs["attention_mask"]
    arguments = dict(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)
    offset = kwargs.get("q_offset", 0)
    # A static cache counts on the device, or it is empty and has more room than tokens.
    if isinstance(offset, torch.Tensor) or offset + q_length < kv_length:
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**arguments)
    return S2Mask(arguments)

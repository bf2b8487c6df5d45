"""Patterns in which queries see blocks of keys: "window", and "adaptive", which chooses blocks by content.

A document is cut into blocks of 128 tokens; its last block may be short. The computation uses a layout in which every
document begins at a block. Packed or padded rows are copied into it; rows of whole blocks are not copied. The backends
`sdpa`, `flex` and `flash_blocks` use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from peft_longlora.kernels.groups import Plan

BLOCK = 128


def default_blocks(group_size: int) -> int:
    """The number of blocks that "adaptive" chooses by content to cost as much as S2-Attn with groups of G tokens.

    A query of S2-Attn sees G/2 keys on average. Here a query always sees three blocks: its own, the one before, the
    first.

    Example: G = 8192: 32 blocks of 128, of which 29 are chosen.
    """
    return max(1, group_size // (2 * BLOCK) - 3)


class Layout(NamedTuple):
    """The places of a batch's tokens in blocks: N places in N / 128 blocks.

    Attributes:
        source: (N,) the flattened token at each place; 0 for an empty place.
        is_token: (N,) bool, False at empty places. position: (N,) the token's position in its document.
        first: (blocks,) the first block of each block's document. is_dense: (blocks,) bool: its document has at most G
            tokens.
        place: (B * S,) the place of each flattened token; 0 for padding. is_real: (B * S,) bool, False at padding.
    """

    source: torch.Tensor
    is_token: torch.Tensor
    position: torch.Tensor
    first: torch.Tensor
    is_dense: torch.Tensor
    place: torch.Tensor
    is_real: torch.Tensor


@dataclass(eq=False)
class BlockPlan(Plan):
    """The blocks of one forward.

    Attributes:
        batch, length: B and S, tokens.
        documents: (start, tokens) in flattened token order, without padding.
        group_size: G, tokens; a document of at most G tokens is dense.
        pattern: "window" or "adaptive".
        chosen: the number of blocks that are chosen by content.
    """

    batch: int
    length: int
    documents: list[tuple[int, int]]
    group_size: int
    pattern: str
    chosen: int

    @classmethod
    def of(
        cls,
        batch: int,
        length: int,
        documents: list[tuple[int, int, int]],
        group_size: int,
        pattern: str,
        blocks: int | None = None,
    ) -> BlockPlan:
        """Make a plan from `groups.find_documents`. With blocks=None, "adaptive" costs as much as S2-Attn."""
        real = [(start, tokens) for start, tokens, number in documents if number]
        return cls(batch, length, real, group_size, pattern, default_blocks(group_size) if blocks is None else blocks)

    @property
    def is_aligned(self) -> bool:
        """Whether the rows already have the layout of blocks."""
        whole = all(tokens % BLOCK == 0 for _, tokens in self.documents)
        return whole and sum(tokens for _, tokens in self.documents) == self.batch * self.length

    @property
    def width(self) -> int:
        """The most blocks that any block of queries sees."""
        sees = self.chosen + 3 if self.pattern == "adaptive" else -(-(self.group_size // 2) // BLOCK) + 2
        dense = -(-self.group_size // BLOCK)
        blocks = [(-(-n // BLOCK), n <= self.group_size) for _, n in self.documents]
        return max((min(count, dense if is_dense else sees) for count, is_dense in blocks), default=1)

    def layout(self, device: torch.device) -> Layout:
        """The layout's tensors, made once for each device."""
        return self.once(("layout", device), lambda: self._make_layout(device))

    def _make_layout(self, device: torch.device) -> Layout:
        source, is_token, position, first, is_dense = [], [], [], [], []
        place = torch.zeros(self.batch * self.length, dtype=torch.long)
        is_real = torch.zeros(self.batch * self.length, dtype=torch.bool)
        at = 0
        for start, tokens in self.documents:
            blocks = -(-tokens // BLOCK)
            own = torch.arange(blocks * BLOCK)
            source.append((own + start).where(own < tokens, 0))
            is_token.append(own < tokens)
            position.append(own)
            first += [at // BLOCK] * blocks
            is_dense += [tokens <= self.group_size] * blocks
            place[start : start + tokens] = own[:tokens] + at
            is_real[start : start + tokens] = True
            at += blocks * BLOCK
        parts = torch.cat(source), torch.cat(is_token), torch.cat(position), torch.tensor(first), torch.tensor(is_dense)
        return Layout(*(x.to(device) for x in (*parts, place, is_real)))

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, S, D) -> (H, N, D), in blocks; 0 at empty places."""
        x = x.transpose(0, 1).flatten(1, 2)
        if self.is_aligned:
            return x
        layout = self.layout(x.device)
        return x.index_select(1, layout.source).where(layout.is_token[:, None], 0)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """(H, N, D) -> (B, S, H, D); 0 at padding."""
        if not self.is_aligned:
            layout = self.layout(x.device)
            x = x.index_select(1, layout.place).where(layout.is_real[:, None], 0)
        return x.transpose(0, 1).unflatten(0, (self.batch, self.length))

    @torch.no_grad()
    def find_seen(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """(H_kv or 1, blocks, width): the blocks that each block of queries sees, ascending; the number `blocks` means
        none.

        Args:
            query: (H, N, D). key: (H_kv, N, D), both in blocks.
        """
        if self.pattern == "window":
            return self.once(("seen", query.device), lambda: self._listed(self._always(query.device)[None]))
        always, is_candidate = self.once(("always", query.device), lambda: self._always_and_candidates(query.device))
        count, heads = len(always), key.shape[0]
        q, k = (x.unflatten(1, (count, BLOCK)) for x in (query, key))
        # (H_kv, blocks, D): the mean of the 128 queries up to each block's first query. Later queries must not choose.
        group = q.unflatten(0, (heads, -1))
        # Sums in float32, but no float32 copy of the row.
        starts, sums = group[:, :, :, 0].mean(1, dtype=torch.float32), group.sum(3, dtype=torch.float32).mean(1)
        asks = (sums.roll(1, 1) - starts.roll(1, 1) + starts) / BLOCK
        scores = asks @ k.mean(2, dtype=torch.float32).mT
        scores = scores.where(is_candidate, -torch.inf)
        best = scores.topk(min(self.chosen, count), dim=-1)
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best.indices, best.values > -torch.inf)
        return self._listed(seen | always)

    def _always(self, device: torch.device) -> torch.Tensor:
        """(blocks, blocks) bool: blocks that are seen whatever their content is."""
        layout = self.layout(device)
        block = torch.arange(len(layout.first), device=device)
        ask, held, first = block[:, None], block, layout.first[:, None]
        if self.pattern == "window":
            near = (ask - held) * BLOCK - (BLOCK - 1) < self.group_size // 2
        else:
            near = ask - held <= 1
        return (held <= ask) & (held >= first) & (near | (held == first) | layout.is_dense[:, None])

    def _always_and_candidates(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`_always`, and the other blocks of the document up to a block's own: one of them may be chosen."""
        always, first = self._always(device), self.layout(device).first[:, None]
        block = torch.arange(len(always), device=device)
        return always, (block <= block[:, None]) & (block >= first) & ~always

    def _listed(self, seen: torch.Tensor) -> torch.Tensor:
        count = seen.shape[-1]
        numbers = torch.arange(count, device=seen.device).where(seen, count)
        return numbers.topk(self.width, dim=-1, largest=False, sorted=True).values

    def may_see(self, q: torch.Tensor, k: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Whether a query sees a key, given that it sees the key's block; both are places in the layout."""
        sees = k <= q
        if self.pattern == "window":
            is_near = (q - k < self.group_size // 2) | (layout.position[k] < BLOCK)
            sees = sees & (is_near | layout.is_dense[q // BLOCK])
        return sees

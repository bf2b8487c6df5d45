"""Where the groups of S2-Attn start and end: host-side arithmetic, done once a forward.

Called by attention's `mask` (once a forward) and by `s2_attention` (for direct calls).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

import torch

from peft_longlora.kernels.patterns import shift_of

# Not a document's number: it marks tokens that a mask lets see later ones.
BIDIRECTIONAL = -(2**31)
# Kernels that need a contiguous partition also compute padding. Short pieces make that cheap.
PADDING_PIECE = 128


def split_document(
    length: int, group_size: int, shift: int = 0, *, first: int = 0, last: int | None = None
) -> list[int]:
    """Lengths of the groups of one document; nothing wraps, the first and the last group may be short.

    Args:
        length: L, tokens of the document without padding.
        group_size: G, tokens.
        shift: the length of the first group of shifted heads, G / 2; 0 for straight heads.
        first, last: the tokens [first, last) to split, if other ranks hold the rest of the document.

    Source: the cumulative lengths of the original's flash path (LongLoRA, llama_attn_replace.py), for any length.
    Example: L = 10, G = 4: straight [4, 4, 2]; shift 2 gives [2, 4, 4], and of its tokens [3, 8) [3, 2].
    """
    last = length if last is None else last
    if length <= group_size:
        return [last - first]
    start = shift if first < shift else first - tokens_before(length, group_size, shift, first) + group_size
    cuts = [first, *range(start, last, group_size), last]
    return [end - begin for begin, end in pairwise(cuts)]


def tokens_before(length: int, group_size: int, shift: int, first: int) -> int:
    """The number of tokens before token `first` in its group.

    Args: as `split_document`.

    Example: L = 10, G = 4, token 3: 3 with straight groups; 1 with shift 2, whose second group is [2, 6).
    """
    return first if length <= group_size or first < shift else (first - shift) % group_size


def split_heads(heads: int, kv_heads: int) -> tuple[int, int]:
    """Number of straight (query heads, KV heads); the rest is shifted.

    KV heads from kv_heads // 2 on are shifted, with the query heads that read them, so that no KV head is needed by
    both halves. If there is only one KV head, both halves read it: query heads from heads // 2 on are shifted, and the
    returned number of KV heads is 0, which means that the KV head is not split.

    Example: (32, 8) -> (16, 4); (9, 3) -> (3, 1); (8, 1) -> (4, 0).
    """
    if kv_heads == 1:
        return heads // 2, 0
    return kv_heads // 2 * (heads // kv_heads), kv_heads // 2


def find_documents(segment_ids: torch.Tensor) -> list[tuple[int, int, int]]:
    """Runs of equal numbers in (B, S) segment ids as (start, length, number), in flattened token order.

    It costs one device synchronisation, because launch parameters depend on the number of documents.
    """
    batch, length = segment_ids.shape
    # Copy everything, because `nonzero` on a device would be a second synchronisation.
    flat = segment_ids.reshape(-1).cpu()
    is_start = torch.ones_like(flat, dtype=torch.bool)
    is_start[1:] = flat[1:] != flat[:-1]
    is_start[::length] = True  # a document never spans two rows
    starts = is_start.nonzero().squeeze(1)
    table = torch.stack((starts, flat[starts].to(starts.dtype))).tolist()
    ends = [*table[0][1:], batch * length]
    return [(start, end - start, number) for start, end, number in zip(table[0], ends, table[1], strict=True)]


def positions_in_documents(cu_seq_lens: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """(B, S) positions that restart where a document starts, from cumulative lengths over the B * S flattened tokens.

    Example: [0, 3, 5], one row of 6 tokens: [0, 1, 2, 0, 1, 0].
    """
    index = torch.arange(batch * length, device=cu_seq_lens.device)
    starts = cu_seq_lens[torch.searchsorted(cu_seq_lens, index, right=True) - 1]
    return (index - starts).view(batch, length)


@dataclass(eq=False)
class Plan:
    """What all layers of a forward share: values that are derived from it are made once."""

    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """A value that a backend derives from this plan: the first layer makes it, the others reuse it."""
        if name not in self._made:
            with torch.inference_mode(False):  # plans are reused, and autograd cannot save tensors of inference mode
                self._made[name] = make()
        return self._made[name]


@dataclass(eq=False)
class Groups(Plan):
    """The plan of one forward: boundaries of the straight and of the shifted heads' groups.

    Boundaries count the B * S flattened tokens, from 0 to B * S without a hole. Stretches of padding are separate
    pieces. Build it with `plan_groups`.

    Attributes:
        batch, length: B and S, tokens.
        straight, shifted: boundaries of the two halves of the heads.
        is_split: whether the halves differ; if not, all heads use `straight` in one call.
        max_length: tokens of the longest piece.
        padding: (B, S) bool tensor, True at padding, or None if there is none.
        padding_starts: the starts of pieces that hold padding only.
        is_regular: whether the pieces, padding aside, have at most four different lengths.
    """

    batch: int
    length: int
    straight: tuple[int, ...]
    shifted: tuple[int, ...]
    max_length: int
    padding: torch.Tensor | None = None
    padding_starts: frozenset[int] = frozenset()
    is_regular: bool = True

    @property
    def is_split(self) -> bool:
        """Whether straight and shifted heads have different groups."""
        return self.straight != self.shifted


def plan_groups(
    batch: int,
    length: int,
    group_size: int,
    pattern: str = "s2",
    *,
    documents: list[tuple[int, int, int]] | None = None,
    padding: torch.Tensor | None = None,
    before: int = 0,
    after: int = 0,
) -> Groups:
    """Cut every document of a (B, S) batch into groups.

    Args:
        batch, length: B and S, tokens.
        group_size: G, tokens; even.
        pattern: one of `PATTERNS`; with "full" documents stay whole.
        documents: from `find_documents`. None: every row is one document, and nothing is synchronised.
        padding: (B, S) bool, True at padding.
        before, after: tokens of the first and of the last document on earlier and later ranks. A group with tokens on
            other ranks is cut at the end of the row.

    Example: one row of 10 tokens, G = 4: straight (0, 4, 8, 10), shifted (0, 2, 6, 10).
    """
    if documents is None:
        documents = [(row * length, length, 1) for row in range(batch)] if length else []
    straight, shifted, padding_starts = [0], [0], set()
    longest, lengths = 0, set()
    for index, (start, tokens, number) in enumerate(documents):
        if number == 0:
            pieces = split_document(tokens, PADDING_PIECE)
            halves = (pieces, pieces)
            padding_starts.update(range(start, start + tokens, PADDING_PIECE))
        elif pattern == "full":
            halves = ([tokens], [tokens])
        else:
            first = before if index == 0 else 0
            whole = first + tokens + (after if index == len(documents) - 1 else 0)
            shifts = 0, shift_of(group_size, pattern)
            halves = [split_document(whole, group_size, x, first=first, last=first + tokens) for x in shifts]
        if number:
            lengths.update(*halves)
        for boundaries, pieces in zip((straight, shifted), halves, strict=True):
            for piece in pieces:
                boundaries.append(boundaries[-1] + piece)
                longest = max(longest, piece)
    return Groups(
        batch=batch,
        length=length,
        straight=tuple(straight),
        shifted=tuple(shifted),
        max_length=longest,
        padding=padding if padding_starts else None,
        padding_starts=frozenset(padding_starts),
        is_regular=len(lengths) <= 4,
    )


def refuse_bidirectional() -> NoReturn:
    """Refuse a mask that is not causal. Raises: NotImplementedError."""
    raise NotImplementedError(
        "This model's attention mask lets tokens see later ones (for example a prefix or an image), which groups "
        "cannot express. Train it within `with use_attention(model, 'dense'):`, or give it causal input only."
    )


def plan_from_segment_ids(segment_ids: torch.Tensor, group_size: int, pattern: str = "s2") -> Groups:
    """`plan_groups` for (B, S) segment ids: 0 = padding, a run of one positive number = one document.

    Raises: NotImplementedError: `mask` marked ids as `BIDIRECTIONAL`.
    """
    batch, length = segment_ids.shape
    documents = find_documents(segment_ids) if length and batch else []
    if any(number == BIDIRECTIONAL for _, _, number in documents):
        refuse_bidirectional()
    return plan_groups(batch, length, group_size, pattern, documents=documents, padding=segment_ids == 0)


def runs_of_equal_pieces(boundaries: tuple[int, ...], skip: frozenset[int]) -> list[tuple[int, int, int]]:
    """Merge neighbouring pieces of equal length: (start, piece length, count), leaving out those in `skip`.

    Example: (0, 2, 6, 10) -> [(0, 2, 1), (2, 4, 2)].
    """
    runs: list[tuple[int, int, int]] = []
    for start, end in pairwise(boundaries):
        if start in skip:
            continue
        if runs and runs[-1][1] == end - start and runs[-1][0] + runs[-1][1] * runs[-1][2] == start:
            runs[-1] = (runs[-1][0], end - start, runs[-1][2] + 1)
        else:
            runs.append((start, end - start, 1))
    return runs

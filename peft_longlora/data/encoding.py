"""Token ids of texts of any length, in little memory. Called by `subject`; imports torch and transformers alone.

While it works, a fast tokenizer holds up to 200 bytes for each character of a text: places, words and strings of all
its tokens. A long text is therefore handed over in pieces that overlap, and the tokens of two pieces are joined where
both have the same ones for a while, at the same place in the text. Tokenizers look no further than at a word and its
neighbours, so what follows such a place is the same whichever piece it stands in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Characters that a tokenizer is given at once, be it documents or pieces of one: about 50 MB while it works.
BATCH_CHARACTERS = 2**18
PIECE = 2**16  # characters: several to a batch, because a tokenizer gives each core texts of its own
OVERLAP = 2**11  # characters that a piece reads before its own, and half of what it reads after them
AGREED = 32  # tokens before a joint, and after it, that must be the same in both pieces


@dataclass(frozen=True)
class Piece:
    """A piece of a text: its first character's place, its token ids, where each token stands in the piece."""

    begin: int
    ids: torch.Tensor
    encoding: Encoding


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[torch.Tensor]:
    """Token ids of each text, (n,) int32, with the special tokens that the tokenizer puts around one.

    They are those of `tokenizer(text)`. A text above BATCH_CHARACTERS is read in pieces, or whole if the tokenizer is
    none of the tokenizers library or two pieces do not agree (a megabyte of one letter), with a warning.
    """
    short = iter(_encode_short(tokenizer, [text for text in texts if len(text) <= BATCH_CHARACTERS]))
    return [next(short) if len(text) <= BATCH_CHARACTERS else _encode_long(tokenizer, text) for text in texts]


def _encode_short(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[torch.Tensor]:
    """Token ids of whole texts. Where tokens stand is not asked, which is half of a fast tokenizer's work."""
    if not texts or not tokenizer.is_fast:
        return [_tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    tokenizer("", verbose=False)  # a call like this one turns off cutting and padding, and the next has no such options
    return [_tensor(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]


def _tensor(ids: list[int]) -> torch.Tensor:
    """int32: a list takes nine times as much."""
    return torch.tensor(ids, dtype=torch.int32)


def _encode_long(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    if not tokenizer.is_fast:
        return _encode_short(tokenizer, [text])[0]
    parts: list[torch.Tensor] = []
    last, first = None, 0  # the piece before, and the first of its tokens that is not in `parts`
    for piece in _pieces(tokenizer, text):
        if last is not None:
            joint = _joint(last, piece)
            if joint is None:
                logger.warning(
                    f"A text of {len(text)} characters is tokenised whole, which takes up to 200 bytes a character: "
                    f"its pieces from character {last.begin} and from {piece.begin} on have no tokens in common."
                )
                return _encode_short(tokenizer, [text])[0]
            parts.append(last.ids[first : joint[0]])
            first = joint[1]
        last = piece
    return torch.cat([*parts, last.ids[first:]])


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Piece]:
    """All pieces in order; as many are made at once as fit into a batch."""
    # No piece begins so late that it could not be joined: each reads twice the overlap beyond its own.
    starts = range(0, len(text) - 2 * OVERLAP, PIECE)
    bounds = [(max(0, start - OVERLAP), start + PIECE + 2 * OVERLAP) for start in starts]
    size = max(1, BATCH_CHARACTERS // PIECE)
    for i in range(0, len(bounds), size):
        yield from _make(tokenizer, text, bounds[i : i + size])


def _make(tokenizer: PreTrainedTokenizerBase, text: str, bounds: list[tuple[int, int]]) -> list[Piece]:
    batch = tokenizer([text[begin:stop] for begin, stop in bounds], verbose=False, return_attention_mask=False)
    made = zip(bounds, batch["input_ids"], batch.encodings, strict=True)
    return [Piece(begin, _tensor(ids), encoding) for (begin, _), ids, encoding in made]


def _joint(last: Piece, piece: Piece) -> tuple[int, int] | None:
    """Numbers of a token in both pieces amid tokens that both have; None: there is none.

    Example: with AGREED = 1, "the cat sat" and "cat sat on" join at "sat", token 2 of the one and 1 of the other.
    """
    for place in range(piece.begin + OVERLAP, piece.begin + 2 * OVERLAP):
        numbers = [p.encoding.char_to_token(place - p.begin) for p in (last, piece)]
        if None in numbers or min(numbers) < AGREED:
            continue
        begins = [p.encoding.token_to_chars(n)[0] + p.begin for p, n in zip((last, piece), numbers, strict=True)]
        around = [p.ids[n - AGREED : n + AGREED] for p, n in zip((last, piece), numbers, strict=True)]
        if begins == [place, place] and len(around[0]) == 2 * AGREED and torch.equal(*around):
            return tuple(numbers)
    return None

"""Token ids of texts of any length, in little memory. Imports only torch and transformers.

While it works, a fast tokenizer holds up to 200 bytes for each character of a text: places, words and strings of all
its tokens. So a long text is tokenised in pieces that overlap. Two pieces are joined at a place in the text around
which both have the same tokens. A tokenizer looks only at a word and its neighbours, so the tokens after such a place
are the same in both pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Characters that a tokenizer gets at once, as documents or as pieces of one: about 50 MB while it works.
BATCH_CHARACTERS = 2**18
PIECE = 2**16  # characters; a batch holds several pieces, because a tokenizer gives each core its own texts
OVERLAP = 2**11  # characters that a piece reads before its own; it reads twice as many after them
AGREED = 32  # tokens before a joint, and after it, that must be the same in both pieces


@dataclass(frozen=True)
class Piece:
    """A piece of a text: the place of its first character, its token ids, and the place of each token in the piece."""

    begin: int
    ids: torch.Tensor
    encoding: Encoding


def encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[torch.Tensor]:
    """Token ids of each text, (n,) int32, with the special tokens that the tokenizer adds to a text.

    They equal those of `tokenizer(text)`. A text longer than BATCH_CHARACTERS is tokenised in pieces. It is tokenised
    whole if the tokenizer is not one of the tokenizers library, or, with a warning, if two pieces cannot be joined (a
    megabyte of one letter).

    Args:
        tokenizer: a slow or a fast one.
        texts: of any length.

    Returns:
        One (n,) int32 tensor for each text, in the order of the texts.
    """
    short = iter(_encode_short(tokenizer, [text for text in texts if len(text) <= BATCH_CHARACTERS]))
    return [next(short) if len(text) <= BATCH_CHARACTERS else _encode_long(tokenizer, text) for text in texts]


def _encode_short(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[torch.Tensor]:
    """Token ids of whole texts, without the places of tokens, which are half of a fast tokenizer's work."""
    if not texts or not tokenizer.is_fast:
        return [_tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    tokenizer("", verbose=False)  # this call turns off truncation and padding; the next call has no options for them
    return [_tensor(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts)]


def _tensor(ids: list[int]) -> torch.Tensor:
    """int32, because a list needs nine times the memory."""
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
                    f"A text of {len(text)} characters is tokenised whole, which needs up to 200 bytes a character: "
                    f"its pieces from character {last.begin} and from {piece.begin} on have no tokens in common."
                )
                return _encode_short(tokenizer, [text])[0]
            parts.append(last.ids[first : joint[0]])
            first = joint[1]
        last = piece
    return torch.cat([*parts, last.ids[first:]])


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Piece]:
    """All pieces in order. A batch of them is made at once."""
    # Each piece reads twice the overlap beyond its own end, so the last piece must not begin later than that.
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
    """The number of one token in both pieces, such that the tokens around it are equal; None if there is none.

    Example: with AGREED = 1, "the cat sat" and "cat sat on" join at "sat", which is token 2 of the first and 1 of the
        second.
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

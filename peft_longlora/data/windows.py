"""Rows of tokens for continued pre-training: every token of every document is in some row."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedTokenizerBase

from peft_longlora.data.arguments import check_count
from peft_longlora.data.counts import Counts
from peft_longlora.data.encoding import encode_all
from peft_longlora.data.records import IGNORED

OPEN_TOKENS = 2**24  # of rows that are not full yet, while rows are packed: 64 MB
FEWEST_OPEN = 16
SHORTEST = 3  # tokens of a row, so that every row can predict one


def to_windows(
    documents: Iterable[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    counts: Counts | None = None,
    *,
    pack: bool = False,
) -> Iterator[dict[str, list[int]]]:
    """Cut documents into rows of at most `length` tokens: {"input_ids", "labels"}.

    A document ends with the end-of-sequence token; if the tokenizer has none, `counts` says so. Every token is in a
    row. A last piece of one token could not predict anything, so it takes one token from the piece before.

    Args:
        documents: as `read_documents` yields them.
        tokenizer: the model's.
        length: tokens of a window, 3 or more.
        counts: filled in along the way, and logged at the end.
        pack: False: a row never holds two documents; give such rows to TRL's SFTTrainer, which packs them, or train on
            documents that are longer than the window. True: rows are filled with the ends of several documents, for a
            plain `Trainer` with batches of one row. Then rows have "position_ids", which restart where a document
            starts.

    Raises:
        ValueError: length is not a whole number or under 3, or a document has only one token.

    Example: 9 tokens with length 4 give rows of 4, 3 and 2.
    """
    length = check_count("length", length, SHORTEST, "of tokens in a row")
    counts = Counts() if counts is None else counts
    pieces = _cut(documents, tokenizer, length, counts)
    for row in _pack(pieces, length) if pack else pieces:
        counts.rows += 1
        yield row
    counts.report()


def _cut(
    documents: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase, length: int, counts: Counts
) -> Iterator[dict[str, list[int]]]:
    for document in documents:
        # A list of a whole document would need nine times the memory; each row is a list only on its way.
        ids = encode_all(tokenizer, [document["text"]])[0]
        if (end := tokenizer.eos_token_id) is not None and ids[-1:].tolist() != [end]:
            ids = torch.cat([ids, ids.new_tensor([end])])
        counts.endless += end is None
        if len(ids) < 2:
            raise ValueError(f"{document['source']}: it has {len(ids)} token and needs 2 or more. Remove it.")
        counts.documents += 1
        counts.tokens += len(ids)
        if len(ids) > length:
            counts.add_longer(document["source"])
        starts = list(range(0, len(ids), length))
        if len(ids) - starts[-1] == 1:
            starts[-1] -= 1
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            counts.pieces += 1
            row = ids[start:stop].tolist()
            yield {"input_ids": row, "labels": list(row)}


def _pack(pieces: Iterable[dict[str, list[int]]], length: int) -> Iterator[dict[str, list[int]]]:
    """Fill rows of at most `length` tokens: each piece goes into the fullest row that has room for it.

    Example: pieces of 4, 3, 1 and 2 tokens with length 4 give rows of 4, 4 (3 + 1) and 2 tokens.
    """
    rooms: list[tuple[int, int]] = []  # (tokens that are free, number of the row), in rising order
    rows: dict[int, list[dict[str, list[int]]]] = {}
    most = max(FEWEST_OPEN, OPEN_TOKENS // length)
    for number, piece in enumerate(pieces):
        size = len(piece["input_ids"])
        place = bisect.bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
            rows[row].append(piece)
        else:
            room, row = length, number
            rows[row] = [piece]
        if room == size:
            yield _join(rows.pop(row))
            continue
        bisect.insort(rooms, (room - size, row))
        if len(rooms) > most:
            yield _join(rows.pop(rooms.pop(0)[1]))
    for _, row in rooms:
        yield _join(rows[row])


def _join(pieces: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    """One row. The first token of a piece is no label, because the token before it belongs to another document."""
    joined: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for piece in pieces:
        joined["input_ids"] += piece["input_ids"]
        joined["labels"] += [IGNORED, *piece["labels"][1:]]
        joined["position_ids"] += range(len(piece["input_ids"]))
    return joined

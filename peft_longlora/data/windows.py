"""Rows of tokens for continued pre-training: every token of every document is in some window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from peft_longlora.data.counts import Counts


def to_windows(
    documents: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase, length: int, counts: Counts | None = None
) -> Iterator[dict[str, list[int]]]:
    """Cut documents into rows of at most `length` tokens for a plain `Trainer`: {"input_ids", "labels"}.

    A document ends with the end-of-sequence token, and a row never holds two documents. Every token is in a row. A last
    row of one token could not predict anything, so it takes one token from the row before.

    Args:
        documents: as `read_documents` yields them.
        length: tokens of a window, 3 or more.
        counts: filled in along the way, and logged at the end.

    Raises:
        ValueError: length is under 3, or a document has only one token.

    Example: 9 tokens with length 4 give rows of 4, 3 and 2.
    """
    if length < 3:
        raise ValueError(f"length={length} must be 3 tokens or more, so that every row can predict one.")
    counts = Counts() if counts is None else counts
    for document in documents:
        ids = tokenizer(document["text"], verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
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
            counts.rows += 1
            yield {"input_ids": ids[start:stop], "labels": ids[start:stop]}
    counts.report()

"""Documents and records as rows of tokens. Every token that is left out is counted and logged.

    read_documents -> to_windows        continued pre-training: every token of every document is in some window
    read_records   -> tokenize_records  instruction tuning: loss on the answer only

Called by the examples and the evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

IGNORED = -100  # transformers' losses leave out tokens with this label
LLAMA_2_PROMPT = "[INST] {} [/INST]"


@dataclass
class Counts:
    """How many documents (or records) were read, cut and dropped; filled in while they are read.

    `longer` counts those that are longer than the window, and `names` names the first few of these.
    """

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    longer: int = 0
    names: list[str] = field(default_factory=list)
    cut_tokens: int = 0
    dropped: int = 0
    dropped_tokens: int = 0

    def add_longer(self, name: str) -> None:
        """Count a document or record that is longer than the window."""
        self.longer += 1
        self.names += [name] if len(self.names) < 3 else []

    def __str__(self) -> str:
        names = f" ({', '.join(self.names)}{', ...' if self.longer > len(self.names) else ''})" if self.names else ""
        return (
            f"{self.documents} read, {self.tokens} tokens -> {self.rows} rows; {self.longer} longer than the "
            f"window{names}: {self.cut_tokens} tokens cut out, {self.dropped} ({self.dropped_tokens} tokens) dropped"
        )

    def report(self) -> None:
        """Log the counts, as a warning if tokens were left out."""
        logger.log(logging.WARNING if self.cut_tokens or self.dropped else logging.INFO, str(self))


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


def tokenize_record(record: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """One whole record as {"input_ids", "labels"}; labels are -100 before the answer.

    The prompt is the tokenizer's chat template with one user turn, or Llama 2's [INST] if the tokenizer has none. The
    answer starts at the first token that differs between the prompt and the prompt with its answer (as in trl's
    SFTTrainer).
    """
    user = f"{record['instruction']}\n{record['input']}" if record.get("input") else record["instruction"]
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": record["output"]}]
        options: dict[str, Any] = dict(return_dict=False, tokenizer_kwargs={"verbose": False})
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **options)
        ids = tokenizer.apply_chat_template(turns, **options)
    else:
        text = LLAMA_2_PROMPT.format(user)
        prompt = tokenizer(text, verbose=False)["input_ids"]
        answer = f"{text} {record['output']}{tokenizer.eos_token or ''}"
        ids = tokenizer(answer, verbose=False)["input_ids"]
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def tokenize_records(
    records: Iterable[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    too_long: Literal["truncate", "drop", "error"] = "truncate",
    counts: Counts | None = None,
) -> Iterator[dict[str, list[int]]]:
    """Rows of at most `max_length` tokens: {"input_ids", "labels"}, for SFTTrainer, which then does not cut them.

    Args:
        records: as `read_records` yields them.
        max_length: tokens of a row, at most.
        too_long: what to do with a longer record. "truncate": its prompt loses its middle; the beginning, the question
            at the end and the whole answer stay. "drop": it is left out. "error": it is refused.
        counts: filled in along the way, and logged at the end. Everything that is cut or dropped is counted.

    Raises:
        ValueError: an unknown `too_long`; a record that is refused, or whose answer leaves no room for a prompt.
    """
    if too_long not in ("truncate", "drop", "error"):
        raise ValueError(f"too_long={too_long!r} is unknown. Use 'truncate', 'drop' or 'error'.")
    counts = Counts() if counts is None else counts
    for record in records:
        row = tokenize_record(record, tokenizer)
        ids, labels = row["input_ids"], row["labels"]
        counts.documents += 1
        counts.tokens += len(ids)
        excess = len(ids) - max_length
        if excess > 0:
            counts.add_longer(record["source"])
            room = labels.count(IGNORED) - excess  # for the prompt
            if too_long == "drop":
                counts.dropped += 1
                counts.dropped_tokens += len(ids)
                continue
            if too_long == "error" or room < 1:
                raise ValueError(
                    f"{record['source']}: {len(ids)} tokens, of which {max_length - room} are the answer's, do not fit "
                    f"in max_length={max_length}. Raise it, shorten the record, or pass too_long='drop'."
                )
            cut = slice((room + 1) // 2, (room + 1) // 2 + excess)
            del ids[cut], labels[cut]
            counts.cut_tokens += excess
        counts.rows += 1
        yield row
    counts.report()

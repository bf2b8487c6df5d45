"""Rows of tokens for instruction tuning: a prompt and its answer, with a loss only on the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from peft_longlora.data.arguments import check_whole
from peft_longlora.data.counts import Counts

IGNORED = -100  # the label that transformers' losses leave out
LLAMA_2_PROMPT = "[INST] {} [/INST]"
MARK = "[[the answer]]"  # replaces a text, to check whether the chat template writes it


def tokenize_record(
    record: dict[str, str], tokenizer: PreTrainedTokenizerBase, counts: Counts | None = None
) -> dict[str, list[int]]:
    """One record as {"input_ids", "labels"}, whole; labels are -100 before the answer.

    The prompt is the tokenizer's chat template with one user turn, or Llama 2's [INST] if there is no template. The
    answer starts at the first token that differs between the prompt and the prompt with its answer (as in trl's
    SFTTrainer). Some templates would cut the answer: templates of reasoning models cut thoughts before </think>. Then
    the template gives only the text around the answer, and the answer is trained whole.

    Args:
        record: {"instruction", "input", "output"} and, for errors, "source".
        tokenizer: the model's.
        counts: counts an answer that the template would have cut.

    Returns:
        {"input_ids", "labels"}: lists of one length.

    Raises:
        ValueError: the template fails or leaves out a message, or no token is left to train on.
    """
    source = record.get("source", "A record")
    user = f"{record['instruction']}\n{record['input']}" if record.get("input") else record["instruction"]
    if tokenizer.chat_template is None:
        text = LLAMA_2_PROMPT.format(user)
        prompt = tokenizer(text, verbose=False)["input_ids"]
        ids = tokenizer(f"{text} {record['output']}{tokenizer.eos_token or ''}", verbose=False)["input_ids"]
    else:
        text, whole = _fill(tokenizer, source, user), _fill(tokenizer, source, user, record["output"])
        if _count(whole, record["output"]) == _count(text, record["output"]):
            whole = _around(tokenizer, source, user, record["output"])
            if counts is not None:
                counts.add_restored(source)
        if not _count(text, user) and MARK not in _fill(tokenizer, source, MARK):
            raise ValueError(f"{source}: the tokenizer's chat template leaves out what the user says. {_CURE}")
        options: dict[str, Any] = dict(add_special_tokens=False, verbose=False)
        prompt, ids = (tokenizer(part, **options)["input_ids"] for part in (text, whole))
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
    if start == len(ids) or not record["output"].strip():
        raise ValueError(f"{source}: no token of the answer is left to train on. Fill the answer in, or remove it.")
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


_CURE = "Give the tokenizer another one: tokenizer.chat_template = ..., or None for Llama 2's [INST]."


def _fill(tokenizer: PreTrainedTokenizerBase, source: str, user: str, answer: str | None = None) -> str:
    """The chat template with one question, and its answer or the beginning of one."""
    turns = [{"role": "user", "content": user}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{source}: the tokenizer's chat template fails ({error}). {_CURE}") from error


def _count(text: str, part: str) -> int:
    """How often a text holds a part, however the template lays out its white space."""
    return "".join(text.split()).count("".join(part.split()))


def _around(tokenizer: PreTrainedTokenizerBase, source: str, user: str, answer: str) -> str:
    """The whole answer, with the text that the template writes around answers."""
    head, mark, tail = _fill(tokenizer, source, user, MARK).rpartition(MARK)
    if not mark:
        raise ValueError(f"{source}: the tokenizer's chat template leaves the answer out. {_CURE}")
    if "</think>" in head and "</think>" in answer and "</think>" not in user:
        raise ValueError(
            f"{source}: the tokenizer's chat template cuts the thoughts before </think> and writes others in their "
            f"place. Take the thoughts out of the answer. Or: {_CURE}"
        )
    return head + answer + tail


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
        tokenizer: the model's.
        max_length: tokens of a row, at most.
        too_long: what to do with a longer record. "truncate": its prompt loses its middle; the beginning, the question
            at the end and the whole answer stay. "drop": it is left out. "error": it is refused.
        counts: filled in along the way, and logged at the end. Everything that is cut or dropped is counted.

    Raises:
        ValueError: an unknown `too_long`; a record that is refused, or whose answer leaves no room for a prompt; as
            `tokenize_record`.
    """
    if too_long not in ("truncate", "drop", "error"):
        raise ValueError(f"too_long={too_long!r} is unknown. Use 'truncate', 'drop' or 'error'.")
    max_length = check_whole("max_length", max_length, 2, "of tokens in a row")
    counts = Counts() if counts is None else counts
    for record in records:
        row = tokenize_record(record, tokenizer, counts)
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
        counts.pieces += 1
        yield row
    counts.report()

"""Rows of tokens for instruction tuning: a prompt and its answer, with a loss only on the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from peft_longlora.data.arguments import check_count
from peft_longlora.data.conversations import (
    ASSISTANT,
    CURE,
    IGNORED,
    MARK,
    Turn,
    begin_turns,
    encode,
    fill,
    shared,
    squeezed,
    tokenize_turns,
    turns_of,
    without_template,
)
from peft_longlora.data.counts import Counts


def tokenize_record(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, counts: Counts | None = None
) -> dict[str, list[int]]:
    """One record as {"input_ids", "labels"}, whole; labels are -100 outside of answers.

    The prompt is the tokenizer's chat template with one user turn, or Llama 2's [INST] if there is no template. The
    answer starts at the first token that differs between the prompt and the prompt with its answer (as in trl's
    SFTTrainer). Some templates would cut the answer: templates of reasoning models cut thoughts before </think>. Then
    the template gives only the text around the answer, and the answer is trained whole.

    Of a conversation of several turns every answer is trained (`conversations.tokenize_turns`). A system message that
    the template refuses or leaves out goes before the first question.

    Args:
        record: {"instruction", "input", "output"}, or {"messages"} as `read_records` yields them; and, for errors,
            "source".
        tokenizer: the model's.
        counts: counts an answer that the template would have cut, a question that it writes otherwise, and an answer
            that it does not end.

    Returns:
        {"input_ids", "labels"}: lists of one length.

    Raises:
        ValueError: the template fails, leaves out a message, or cuts one of several turns; it does not write the
            question before the answer; no token is left to train on.
    """
    source = record.get("source", "A record")
    turns = begin_turns(tokenizer, turns_of(record))
    if tokenizer.chat_template is None:
        row = without_template(turns, tokenizer)
    elif sum(turn["role"] == ASSISTANT for turn in turns) > 1:
        row = tokenize_turns(turns, tokenizer, source)
    else:
        row = _one_answer(turns, tokenizer, source, counts)
    if not any(label != IGNORED for label in row["labels"]) or not turns[-1]["content"].strip():
        raise ValueError(f"{source}: no token of the answer is left to train on. Fill the answer in, or remove it.")
    if counts is not None and _is_endless(turns, tokenizer, source):
        counts.endless += 1
    return row


def _is_endless(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, source: str) -> bool:
    """Whether the chat template writes nothing behind the last answer, so a model would not learn to stop."""
    if tokenizer.chat_template is None:
        return False
    text = fill(tokenizer, source, [*turns[:-1], {**turns[-1], "content": MARK}])
    return text.rstrip().endswith(MARK)


def _one_answer(
    turns: list[Turn], tokenizer: PreTrainedTokenizerBase, source: str, counts: Counts | None
) -> dict[str, list[int]]:
    """(system,) user, assistant. An answer that the template would cut is trained whole."""
    *asked, answer = turns
    user, said = asked[-1]["content"], answer["content"]
    text, whole = fill(tokenizer, source, asked), fill(tokenizer, source, turns)
    if _count(whole, said) == _count(text, said):
        whole = _around(tokenizer, source, asked, said)
        if counts is not None:
            counts.add_restored(source)
    if not _count(text, user):  # left out, or written otherwise, as by `| trim` and more
        marked = [*asked[:-1], {**asked[-1], "content": MARK}]
        text_of_mark, user = fill(tokenizer, source, marked), MARK
        if MARK not in text_of_mark:
            raise ValueError(f"{source}: the tokenizer's chat template leaves out what the user says. {CURE}")
        begins = _common(text_of_mark, fill(tokenizer, source, [*marked, answer]))
        if counts is not None:
            counts.add_rewritten(source)
    else:
        begins = _common(text, whole)
    if not _count(begins, user):
        raise ValueError(
            f"{source}: the tokenizer's chat template does not begin the answered conversation with what the user "
            f"says, as it does when the model is asked. {CURE}"
        )
    prompt, ids = (encode(tokenizer, part) for part in (text, whole))
    start = shared(prompt, ids)
    return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}


def _common(text: str, other: str) -> str:
    """What both texts begin with."""
    return text if other.startswith(text) else text[: shared(text, other)]


def _count(text: str, part: str) -> int:
    """How often a text holds a part, however the template lays out its white space."""
    return squeezed(text).count(squeezed(part))


def _around(tokenizer: PreTrainedTokenizerBase, source: str, asked: list[Turn], answer: str) -> str:
    """The whole answer, with the text that the template writes around answers."""
    head, mark, tail = fill(tokenizer, source, [*asked, {"role": ASSISTANT, "content": MARK}]).rpartition(MARK)
    if not mark:
        raise ValueError(f"{source}: the tokenizer's chat template leaves the answer out. {CURE}")
    if "</think>" in head and "</think>" in answer and not any("</think>" in turn["content"] for turn in asked):
        raise ValueError(
            f"{source}: the tokenizer's chat template cuts the thoughts before </think> and writes others in their "
            f"place. Take the thoughts out of the answer. Or: {CURE}"
        )
    return head + answer + tail


def longest_prompt(labels: list[int]) -> slice:
    """The longest stretch of a row that is not trained: the prompt, or that of several which holds the long text."""
    end, best = 0, slice(0, 0)
    for is_prompt, group in groupby(labels, lambda label: label == IGNORED):
        start, end = end, end + sum(1 for _ in group)
        if is_prompt and end - start > best.stop - best.start:
            best = slice(start, end)
    return best


def tokenize_records(
    records: Iterable[dict[str, Any]],
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
        too_long: what to do with a longer record. "truncate": its longest prompt loses its middle; the beginning, the
            question at the end and all answers stay. "drop": it is left out. "error": it is refused.
        counts: filled in along the way, and logged at the end. Everything that is cut or dropped is counted.

    Raises:
        ValueError: an unknown `too_long`; a tokenizer with neither a chat template nor an end-of-sequence token; a
            record that is refused, or whose answer leaves no room for a prompt; as `tokenize_record`.
    """
    if too_long not in ("truncate", "drop", "error"):
        raise ValueError(f"too_long={too_long!r} is unknown. Use 'truncate', 'drop' or 'error'.")
    max_length = check_count("max_length", max_length, 2, "of tokens in a row")
    if tokenizer.chat_template is None and tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has neither a chat template nor an end-of-sequence token, so a model would never learn to "
            "end its answers. Set tokenizer.eos_token or tokenizer.chat_template."
        )
    counts = Counts() if counts is None else counts
    for record in records:
        row = tokenize_record(record, tokenizer, counts)
        ids, labels = row["input_ids"], row["labels"]
        counts.documents += 1
        counts.tokens += len(ids)
        excess = len(ids) - max_length
        if excess > 0:
            counts.add_longer(record["source"])
            prompt = longest_prompt(labels)
            room = prompt.stop - prompt.start - excess  # for the prompt
            if too_long == "drop":
                counts.dropped += 1
                counts.dropped_tokens += len(ids)
                continue
            if too_long == "error" or room < 1:
                raise ValueError(
                    f"{record['source']}: {len(ids)} tokens, of which {max_length - room} must stay (answers, "
                    f"and shorter prompts), do not fit in max_length={max_length}. Raise it, shorten "
                    f"the record, or pass too_long='drop'."
                )
            begin = prompt.start + (room + 1) // 2
            cut = slice(begin, begin + excess)
            del ids[cut], labels[cut]
            counts.cut_tokens += excess
        counts.rows += 1
        counts.pieces += 1
        counts.answer_tokens += len(labels) - labels.count(IGNORED)
        yield row
    counts.report()

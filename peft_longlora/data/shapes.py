"""The shapes of a record: by which of its fields it is read, which are refused, and which are only counted.

A field that changes what is trained is read or refused, so no model is trained on less than its records say.
"""

from __future__ import annotations

from typing import Any

from peft_longlora.data.conversations import ASSISTANT, SYSTEM, UNREAD, USER, Turn, read_turns, turns_of
from peft_longlora.data.counts import Counts
from peft_longlora.data.fields import filled, is_given, text_of

MESSAGES, CONVERSATIONS = "messages", "conversations"
PAIR, ALPACA = ("prompt", "completion"), ("instruction", "output")
SHAPES = ((MESSAGES,), (CONVERSATIONS,), PAIR, ALPACA)  # if a record has several, the first
READ = (
    'Records are {"instruction", "input", "output"} (with "history", pairs of a question and its answer), {"prompt", '
    '"completion"}, {"messages": [{"role", "content"}, ...]} or {"conversations": [{"from", "value"}, ...]}, each also '
    'with "system". Rename the fields.'
)
# What changes what is trained. The fields of all shapes do too: a record may have two shapes.
CHANGING = {*(key for shape in SHAPES for key in shape), "input", "history", SYSTEM, "system_prompt"}
CHANGING |= {
    *UNREAD,
    "context",
    "contexts",
    "documents",
    "passage",
    "passages",
    "chat_template",
    "chat_template_kwargs",
}
CURES = {"system_prompt": "Rename it to 'system', or remove it."}
CURES |= dict.fromkeys(("context", "contexts", "documents", "passage", "passages"), "Put its text into the question.")


def read_record(name: str, row: Any, counts: Counts | None = None) -> dict[str, Any]:
    """{"instruction", "input", "output"}, or of a conversation {"messages"}; `documents.read_records` says of what.

    Args:
        name: the record's place, for errors.
        row: the record.
        counts: counts the fields that are not read.

    Raises: ValueError: no known shape, a field that is not read and would change what is trained, or bad text.
    """
    shape = _shape(name, row)
    read = {*shape, SYSTEM}
    if shape == ALPACA:
        question, answer = (filled(name, row, key) for key in ALPACA)
        more = text_of(name, row, "input") if row.get("input") is not None else ""
        record: dict[str, Any] = {"instruction": question, "input": more, "output": answer}
        turns = [*_history(name, row.get("history")), *turns_of(record)]
        read |= {"input", "history"}
    elif shape == PAIR and not any(isinstance(row.get(key), list) for key in PAIR):
        question, answer = (filled(name, row, key) for key in PAIR)
        turns = turns_of({"instruction": question, "output": answer})
    else:
        turns = read_turns(name, " + ".join(map(repr, shape)), _turns(name, row, shape), counts)
    if turns[0]["role"] == SYSTEM:
        read.discard(SYSTEM)  # a second system message is refused, unless it is the same
    elif is_given(row.get(SYSTEM)):
        turns = [{"role": SYSTEM, "content": text_of(name, row, SYSTEM)}, *turns]
    _check_others(name, row, read, [turn["content"] for turn in turns], counts)
    if len(turns) > 2:
        return {"messages": turns}
    pair = {"instruction": turns[0]["content"], "input": "", "output": turns[1]["content"]}
    return record if shape == ALPACA else pair


def refuse_unread(name: str, row: dict[str, Any], read: set[str], texts: list[str] | tuple[str, ...] = ()) -> None:
    """Refuse a field that would change what is trained.

    Args:
        name: the record's place.
        row: the record.
        read: its fields that are read.
        texts: what is read of it. A field that only says one of them again changes nothing.

    Raises: ValueError.
    """
    said = {text.strip() for text in texts}
    for key in row:
        if key in CHANGING - read and is_given(row[key]):
            if isinstance(row[key], str) and row[key].strip() in said:
                continue
            raise ValueError(
                f"{name}: holds {key!r}, which is not read beside {', '.join(map(repr, sorted(read & row.keys())))}, "
                f"and changes what the record asks or answers. {CURES.get(key, 'Remove it, or the record.')}"
            )


def _shape(name: str, row: Any) -> tuple[str, ...]:
    if not isinstance(row, dict):
        raise ValueError(f"{name}: a {type(row).__name__}, not an object. {READ}")
    for shape in SHAPES:
        if all(row.get(key) is not None for key in shape):
            return shape
    near = max(SHAPES, key=lambda shape: sum(key in row for key in shape))
    if not all(key in row for key in near):
        raise ValueError(f"{name}: the fields are {sorted(row)}. {READ}")
    return near


def _turns(name: str, row: dict[str, Any], shape: tuple[str, ...]) -> list[Any]:
    """The turns as they stand in the record."""
    for key in shape:
        if not isinstance(row[key], list):
            what = "null" if row[key] is None else f"a {type(row[key]).__name__} ({str(row[key])[:40]!r})"
            raise ValueError(f"{name}: {key!r} is {what}, not a list.")
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in row[shape[0]]]
    if shape == PAIR and ASSISTANT in roles:
        raise ValueError(
            f"{name}: 'prompt' holds an answer, and here every answer is trained, not only 'completion'. If that is "
            f"meant, join both lists as 'messages'; otherwise put the earlier turns into one question."
        )
    return [turn for key in shape for turn in row[key]]


def _history(name: str, pairs: Any) -> list[Turn]:
    """LLaMA-Factory's earlier turns; it trains their answers too."""
    if not is_given(pairs):
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{name}: 'history' is not a list of pairs of a question and its answer. Correct it.")
    said = [dict(zip((USER, ASSISTANT), pair, strict=True)) for pair in pairs]
    places = [f"{name}: 'history'[{number}]" for number in range(len(said))]
    return [
        {"role": role, "content": filled(place, pair, role)}
        for place, pair in zip(places, said, strict=True)
        for role in (USER, ASSISTANT)
    ]


def _check_others(name: str, row: dict[str, Any], read: set[str], texts: list[str], counts: Counts | None) -> None:
    if row.get("weight") == 0 or row.get("train") is False or row.get("label") is False:  # `label` is that of TRL's KTO
        raise ValueError(f"{name}: is marked as not to be trained, and every record is. Remove it.")
    refuse_unread(name, row, read, texts)
    if counts is not None:
        for key in row.keys() - read - CHANGING:
            if is_given(row[key]):
                counts.add_unread(key)

"""Documents and records of files and datasets. Nothing is skipped silently: bad data is refused by file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging

from peft_longlora.data.counts import Counts
from peft_longlora.data.rows import NO_DATA, Sources, rows_of_sources

logger = logging.get_logger(__name__)


def read_documents(
    sources: Sources,
    *,
    split: str = "train",
    config: str | None = None,
    field: str = "text",
    skip_empty: bool = False,
    repositories: bool = False,
    counts: Counts | None = None,
) -> Iterator[dict[str, str]]:
    """Documents one by one, as {"text", "source"}. At most one document, or one JSON list, is in memory.

    Args:
        sources: .txt and .md (one document a file), .jsonl and .json (one object a line, or one list of objects), each
            also .gz; .pdf and .parquet; folders of such files; or ids of datasets on the Hub, which are streamed.
        split: of a dataset on the Hub.
        config: of a dataset on the Hub, if it has several.
        field: the name of the text field.
        skip_empty: skip an empty document with a warning, instead of raising an error.
        repositories: folders are source trees. Each repository (a folder with .git; if there is none, the whole folder)
            is one document: its files in the order of their paths, each under its path. `repository.read_repository`
            says which files are left out.
        counts: counts what is left out. None: it is logged.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a source cannot be read, is not JSON, or has a text that is missing, empty or not a string. The
            message names the file and the line (in a list: the record).
    """
    for name, row in rows_of_sources(sources, split, config, field, repositories, counts):
        text = _string(name, row, field)
        if text.strip():
            yield {"text": text, "source": name}
        elif skip_empty and counts is not None:
            counts.leave_out("empty texts")
        elif skip_empty:
            logger.warning(f"{name}: {field!r} is empty, left out.")
        else:
            raise ValueError(f"{name}: {field!r} is empty. Remove the document (in Python: or pass skip_empty=True).")


def read_records(
    sources: Sources, *, split: str = "train", config: str | None = None, counts: Counts | None = None
) -> Iterator[dict[str, str]]:
    """LongAlpaca's records, as {"instruction", "input", "output", "source"}; "input" may be missing or null.

    {"prompt", "completion"} of two strings, and {"messages"} of one question and its answer, are read as instruction
    and output.

    Args:
        sources: as for `read_documents`, without .txt, .md and .pdf.
        split: of a dataset on the Hub.
        config: of a dataset on the Hub, if it has several.
        counts: counts what is left out. None: it is logged.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a source cannot be read, or a record has no instruction or no output.
    """
    for name, row in rows_of_sources(sources, split, config, None, counts=counts):
        row = _as_record(name, row)
        record = {key: _string(name, row, key) for key in ("instruction", "output")}
        if empty := [key for key, text in record.items() if not text.strip()]:
            raise ValueError(f"{name}: {empty[0]!r} is empty. Fill it in, or remove the record.")
        record["input"] = "" if row.get("input") is None else _string(name, row, "input")
        yield {**record, "source": name}


def _as_record(name: str, row: Any) -> Any:
    """The row with LongAlpaca's names, if it has those of TRL.

    Raises: ValueError: a conversation of another form than (system,) user, assistant.
    """
    if not isinstance(row, dict) or "instruction" in row:
        return row
    if {"prompt", "completion"} <= row.keys():
        return {"instruction": row["prompt"], "output": row["completion"]}
    turns = row.get("messages")
    if not isinstance(turns, list):
        return row
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(
            f"{name}: 'messages' has the roles {roles}. One question and its answer are read: (system,) user, "
            f"assistant. Split the conversation."
        )
    texts = [_string(name, turn, "content") for turn in turns]
    return {"instruction": "\n\n".join(texts[:-1]), "output": texts[-1]}


def _string(name: str, row: Any, key: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{name}: a {type(row).__name__}, not an object with the field {key!r}.")
    text = row.get(key)
    if text is None:
        raise ValueError(f"{name}: no {key!r}. The fields are {sorted(row)}. {NO_DATA}")
    if not isinstance(text, str):
        raise ValueError(f"{name}: {key!r} is a {type(text).__name__} ({str(text)[:40]!r}), not a string.")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"{name}: {key!r} holds half of a surrogate pair, which is not text. Save the file again as UTF-8."
        )
    return text

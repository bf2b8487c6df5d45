"""Documents and records of files and datasets. Nothing is skipped silently: bad data is refused by file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging

from peft_longlora.data.conversations import read_turns
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
) -> Iterator[dict[str, Any]]:
    """LongAlpaca's records, as {"instruction", "input", "output", "source"}; "input" may be missing or null.

    {"prompt", "completion"} of two strings, and a conversation of one question and its answer, are read as instruction
    and output. Other conversations are {"messages", "source"}: turns as {"role", "content"}, in the order (system,)
    user, assistant, user, assistant, ... They come as {"messages"}, or as ShareGPT's {"conversations"}.

    Args:
        sources: as for `read_documents`, without .txt, .md and .pdf.
        split: of a dataset on the Hub.
        config: of a dataset on the Hub, if it has several.
        counts: counts what is left out. None: it is logged.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a source cannot be read; a record has no instruction or no output; a conversation has other turns,
            an empty one, or calls of tools.
    """
    for name, row in rows_of_sources(sources, split, config, None, counts=counts):
        fields = row.keys() if isinstance(row, dict) and "instruction" not in row else set()
        key = next((key for key in ("messages", "conversations") if key in fields), None)
        if key and not {"prompt", "completion"} <= fields:
            turns = read_turns(name, row, key, _string)
            if len(turns) != 2:
                yield {"messages": turns, "source": name}
                continue
            (question, answer), more = (turn["content"] for turn in turns), ""
        else:
            is_pair = bool({"prompt", "completion"} & fields)
            keys = ("prompt", "completion") if is_pair else ("instruction", "output")
            question, answer = (_filled(name, row, key) for key in keys)
            more = "" if is_pair or row.get("input") is None else _string(name, row, "input")
        yield {"instruction": question, "output": answer, "input": more, "source": name}


def _filled(name: str, row: Any, key: str) -> str:
    """A text that is not empty."""
    text = _string(name, row, key)
    if not text.strip():
        raise ValueError(f"{name}: {key!r} is empty. Fill it in, or remove the record.")
    return text


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

"""Documents and records of files and datasets. Nothing is skipped silently: bad data is refused by file and line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.utils import logging

from peft_longlora.data.counts import Counts
from peft_longlora.data.fields import text_of
from peft_longlora.data.rows import Sources, rows_of_sources
from peft_longlora.data.shapes import read_record

logger = logging.get_logger(__name__)

EMPTY = "Remove the document (in Python: or pass skip_empty=True)."


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
        is_skipped = skip_empty and isinstance(row, dict) and row.get(field, "") is None
        text = "" if is_skipped else text_of(name, row, field, EMPTY)
        if text.strip():
            yield {"text": text, "source": name}
        elif skip_empty and counts is not None:
            counts.leave_out("empty texts")
        elif skip_empty:
            logger.warning(f"{name}: {field!r} is empty, left out.")
        else:
            raise ValueError(f"{name}: {field!r} is empty. {EMPTY}")


def read_records(
    sources: Sources, *, split: str = "train", config: str | None = None, counts: Counts | None = None
) -> Iterator[dict[str, Any]]:
    """LongAlpaca's records, as {"instruction", "input", "output", "source"}; "input" may be missing or null.

    {"prompt", "completion"}, and a conversation of one question and its answer, are read as instruction and output.
    Other conversations are {"messages", "source"}: turns as {"role", "content"}, in the order (system,) user,
    assistant, user, assistant, ... They come as {"messages"}, as ShareGPT's {"conversations"}, as TRL's {"prompt",
    "completion"} of two lists, or with the fields "system" and "history", which LLaMA-Factory has.

    Args:
        sources: as for `read_documents`, without .txt, .md and .pdf.
        split: of a dataset on the Hub.
        config: of a dataset on the Hub, if it has several.
        counts: counts what is left out, and the fields that are not read. None: it is logged.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a source cannot be read; a record has another shape, an empty text, or a field that is not read and
            would change what is trained; a conversation has other turns, an empty one, or calls of tools.
    """
    unread = Counts() if counts is None else counts
    for name, row in rows_of_sources(sources, split, config, None, counts=counts):
        yield {**read_record(name, row, unread), "source": name}
    if counts is None and unread.unread:
        logger.warning(f"{sources}: {unread.unread_text()}.")

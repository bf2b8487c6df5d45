"""A text in a field of a record: read, or refused by file and line."""

from __future__ import annotations

import re
from typing import Any

from peft_longlora.data.rows import NO_DATA


def text_of(name: str, row: Any, key: str, cure: str = "Fill it in, or remove the record.") -> str:
    """The text of a field.

    Args:
        name: the record's place, for errors.
        row: the record.
        key: the field.
        cure: what to do if the field is null.

    Raises: ValueError: no object, or the field is missing, null, or no text.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{name}: a {type(row).__name__}, not an object with the field {key!r}.")
    if key not in row:
        raise ValueError(f"{name}: no {key!r}. The fields are {sorted(row)}. {NO_DATA}")
    text = row[key]
    if text is None:
        raise ValueError(f"{name}: {key!r} is null. {cure}")
    if not isinstance(text, str):
        raise ValueError(f"{name}: {key!r} is a {type(text).__name__} ({str(text)[:40]!r}), not a string.")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"{name}: {key!r} holds half of a surrogate pair, which is not text. Save the file again as UTF-8."
        )
    return text


def filled(name: str, row: Any, key: str) -> str:
    """A text that is not empty.

    Raises: ValueError: as `text_of`, or it is empty.
    """
    text = text_of(name, row, key)
    if not text.strip():
        raise ValueError(f"{name}: {key!r} is empty. Fill it in, or remove the record.")
    return text


def is_given(value: Any) -> bool:
    """Whether a field says something: not null, false, or empty, as files with the same columns everywhere leave it."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and value is not False and not (isinstance(value, dict | list) and not value)

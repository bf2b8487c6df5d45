"""Digests of documents and records, by which held-out data is compared with training data.

`load_rows` notes those of all that it reads in a file beside its rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from peft_longlora.data.conversations import turns_of

SUFFIX = ".texts"  # of the file: a line for each document or record, its digest and its source


def digest(document: dict[str, Any]) -> str:
    """A digest of a document's text, or of a record's turns. Blanks at the ends of texts make no difference.

    Args:
        document: as `read_documents` or `read_records` yields it.
    """
    turns = [{"role": "", "content": document["text"]}] if "text" in document else turns_of(document)
    found = hashlib.sha256()
    for turn in turns:
        found.update(f"{turn['role']}\0{turn['content'].strip()}\0".encode())
    return found.hexdigest()[:32]


def noting(documents: Iterable[dict[str, Any]], file: TextIO) -> Iterator[dict[str, Any]]:
    """The documents or records as they come; their digests and sources are written into a file."""
    for document in documents:
        file.write(f"{digest(document)} {json.dumps(document['source'])}\n")
        yield document


def check_held_out(trained: Any, held_out: Any, what: str = "The held-out data") -> None:
    """Refuse held-out rows of which a document or record is training data: the same file, a copy, or another shape.

    Args:
        trained: rows that `load_rows` made, or what a Trainer maps them to. Rows of another origin are not known.
        held_out: further rows that `load_rows` made.
        what: names the held-out data, for the message.

    Raises: ValueError: names a source on both sides, and how many there are.

    Examples:
        >>> check_held_out(load_rows("books/", tokenizer, 32768), load_rows("other-books/", tokenizer, 32768))
    """
    notes = notes_of(held_out)
    refuse_shared(trained, lambda: dict(_read(notes)) if notes else {}, what)


def notes_of(rows: Any) -> Path | None:
    """The file that `load_rows` wrote beside these rows; None if it did not make them, or if its user deleted it.

    Args:
        rows: as `load_rows` gives them, or as a Trainer maps them.
    """
    checksums = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    path = Path(checksums.get("texts", {}).get("checksum") or "")
    return path if path.suffix == SUFFIX and path.is_file() else None


def refuse_shared(trained: Any, held: Callable[[], dict[str, str]], what: str) -> None:
    """Refuse held-out data of which a document or record is training data.

    Args:
        trained: rows that `load_rows` made; others are not known.
        held: gives the sources of the held-out documents or records by their digests.
        what: names the held-out data, for the message.

    Raises: ValueError: names a source on both sides, and how many there are.
    """
    notes = notes_of(trained)
    if notes is None:
        return
    known = held()
    both = {found: source for found, source in _read(notes) if found in known}
    if both:
        first, source = next(iter(both.items()))
        raise ValueError(
            f"{what} holds {known[first]!r}, which is training data: {source!r} is the same text ({len(both):,} of "
            f"{len(known):,} held-out texts are). A result on them says nothing about other text. Hold other data out."
        )


def _read(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            found, _, source = line.partition(" ")
            yield found, json.loads(source)

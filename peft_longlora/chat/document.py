"""A text to ask about, read from a file. It knows the page or line of each character.

Called by `longlora chat` and the page (app/); knows nothing of models.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_longlora.data.limits import Limits
from peft_longlora.data.pdf import read_pages, refuse_scan
from peft_longlora.data.pdf_process import read_pages_apart
from peft_longlora.data.rows import TEXTS

PAGE_BREAK = "\n\n"


@dataclass(frozen=True)
class Document:
    """A text, and the place of its parts in the file.

    Attributes:
        name: the file's name.
        text: all of it, without white space around it.
        starts: offsets in `text` at which pages (PDF) or lines start, ascending.
        labels: the numbers of these pages or lines in the file.
        unit: "page" or "line".
        notes: warnings about parts of the file that are not in the text.
    """

    name: str
    text: str
    starts: list[int] = field(repr=False)
    labels: list[int] = field(repr=False)
    unit: str
    notes: list[str] = field(default_factory=list)

    def place(self, start: int, end: int) -> str:
        """The place of the characters [start, end), such as "page 12" or "lines 3-5"."""
        first, last = (
            self.labels[max(bisect.bisect_right(self.starts, i) - 1, 0)] for i in (start, max(start, end - 1))
        )
        return f"{self.unit} {first}" if first == last else f"{self.unit}s {first}-{last}"


def read_document(
    path: str | Path,
    limits: Limits | None = None,
    is_stopped: Callable[[], bool] | None = None,
    on_page: Callable[[int, int], Any] | None = None,
) -> Document:
    """Read a .txt, .md or .pdf file.

    Args:
        path: of the file; "~" is the home folder.
        limits: how large the file may be, and how long reading it may take. None: no limits.
        is_stopped: if given, a PDF is read in a process of its own, which ends when this is true, or at a limit. Give
            it for files of strangers.
        on_page: called with the pages read and all pages, if `is_stopped` is given.

    Raises:
        ValueError: the path is a URL, a folder or does not exist; the file is of another kind, is empty, or is not what
            its name says; a PDF is encrypted or holds no text.
        ImportError: pypdf, which reads PDF, is not installed.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(path)):
        raise ValueError(f"{path} is a URL, and only files can be read: download it first.")
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give one file ({', '.join(TEXTS)}).")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file but a pipe or a device: save the text as a file.")
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    if path.suffix.lower() not in TEXTS:
        raise ValueError(
            f"{path}: {path.suffix or 'a name without suffix'} is none of {', '.join(TEXTS)}. Give a file of these."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): give a file with text.")
    limits = limits or Limits()
    if path.suffix.lower() != ".pdf":
        return _read_text(path, limits)
    return _made_of(
        path, read_pages_apart(path, limits, is_stopped, on_page) if is_stopped else read_pages(path, limits)
    )


def _read_text(path: Path, limits: Limits) -> Document:
    raw = path.read_bytes()
    if b"\0" in raw:
        raise ValueError(f"{path} is a binary file, not text (byte {raw.index(0)} is 0); .pdf files need that suffix.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}). "
            f"Convert it first: iconv -f LATIN1 -t UTF-8"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip()
    cut = len(text) - len(text.lstrip())
    first = 1 + text.count("\n", 0, cut)
    text = text[cut:]
    if not text:
        raise ValueError(f"{path} holds only white space: give a file with text.")
    limits.check_characters(path, len(text))
    starts = [0] + [match.end() for match in re.finditer("\n", text)]
    return Document(path.name, text, starts, list(range(first, first + len(starts))), "line")


def _made_of(path: Path, pages: list[str]) -> Document:
    refuse_scan(path, pages)
    text, starts, labels = "", [], []
    for number, page in enumerate(pages, 1):
        if page:
            text += PAGE_BREAK if text else ""
            starts.append(len(text))
            labels.append(number)
            text += page
    bare = [number for number, page in enumerate(pages, 1) if not page]
    notes = []
    if bare:
        shown = ", ".join(map(str, bare[:10])) + (", ..." if len(bare) > 10 else "")
        notes.append(f"{len(bare)} of {len(pages)} pages hold no text and cannot be asked about: {shown}.")
    return Document(path.name, text, starts, labels, "page", notes)

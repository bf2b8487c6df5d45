"""Limits for reading a file, for pages that serve strangers. Called by the chat and by pdf.py."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """The largest size of a document and the longest time to read it. The checks raise ValueError.

    Attributes:
        pages: pages of a PDF.
        characters: characters of the text.
        seconds: time to read a PDF, checked after each page.
    """

    pages: float = math.inf
    characters: float = math.inf
    seconds: float = math.inf

    def check_pages(self, path: Path, count: int) -> None:
        """Refuse a PDF that has too many pages."""
        if count > self.pages:
            raise ValueError(f"{path} has {count:,} pages, and at most {self.pages:,} are read here. Split the file.")

    def check_characters(self, path: Path, count: int) -> None:
        """Refuse a text that is too long."""
        if count > self.characters:
            raise ValueError(
                f"{path} holds {count:,} characters or more, and at most {self.characters:,} are read here. "
                f"Split the file."
            )

    def check_time(self, path: Path, end: float, place: str) -> None:
        """Refuse a file that takes too long: `end` is a time of `time.monotonic`."""
        if time.monotonic() > end:
            raise ValueError(
                f"{path} takes longer to read than {self.seconds:g} seconds, which ended at {place}. "
                f"Save its text as .txt."
            )

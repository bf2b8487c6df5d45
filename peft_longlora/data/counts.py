"""Counts documents, records and tokens on their way to rows, also those that are cut or left out."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.utils import logging

logger = logging.get_logger(__name__)

NAMED = 3  # places that are named; the others are counted


@dataclass
class Counts:
    """Numbers of documents (or records), tokens and rows; filled in while data is read.

    Attributes:
        documents, tokens: read. rows: made from them.
        longer: documents or records longer than the window. names: sources of the first few of them.
        cut_tokens: tokens left out of rows. dropped, dropped_tokens: records left out, and their tokens.
        restored: answers that are trained whole although the chat template would have cut them. restored_names: sources
            of the first few of them.
    """

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    longer: int = 0
    names: list[str] = field(default_factory=list)
    cut_tokens: int = 0
    dropped: int = 0
    dropped_tokens: int = 0
    restored: int = 0
    restored_names: list[str] = field(default_factory=list)

    def add_longer(self, name: str) -> None:
        """Count a document or record that is longer than the window."""
        self.longer += 1
        self.names += [name] if len(self.names) < NAMED else []

    def add_restored(self, name: str) -> None:
        """Count an answer that is trained whole although the chat template would have cut it."""
        self.restored += 1
        self.restored_names += [name] if len(self.restored_names) < NAMED else []

    def __str__(self) -> str:
        text = (
            f"{self.documents} read, {self.tokens} tokens -> {self.rows} rows; {self.longer} longer than the "
            f"window{_named(self.names, self.longer)}: {self.cut_tokens} tokens cut out, {self.dropped} "
            f"({self.dropped_tokens} tokens) dropped"
        )
        if self.restored:
            text += (
                f"; {self.restored} answers that the chat template would have cut, such as thoughts before </think>, "
                f"are trained whole{_named(self.restored_names, self.restored)}"
            )
        return text

    def report(self) -> None:
        """Log the counts: as a warning if tokens were left out, or if an answer differs from the chat template's."""
        is_odd = self.cut_tokens or self.dropped or self.restored
        logger.log(logging.WARNING if is_odd else logging.INFO, str(self))


def _named(names: list[str], count: int) -> str:
    return f" ({', '.join(names)}{', ...' if count > len(names) else ''})" if names else ""

"""What became of documents and records on their way to rows: nothing is lost without being counted."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.utils import logging

logger = logging.get_logger(__name__)

NAMED = 3  # places that are named; the others are counted


@dataclass
class Counts:
    """What became of documents (or records) on their way to rows of tokens; filled in while they are read.

    Attributes:
        documents, tokens, rows: read, and made of them.
        longer: documents or records above the window. names: where the first few of them came from.
        cut_tokens: left out of rows. dropped, dropped_tokens: records left out.
        restored: answers that the chat template would have cut, and that are trained whole. restored_names: where the
            first few of them came from.
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
        """Log it: as a warning if tokens were left out, or an answer is not as the chat template writes it."""
        is_odd = self.cut_tokens or self.dropped or self.restored
        logger.log(logging.WARNING if is_odd else logging.INFO, str(self))


def _named(names: list[str], count: int) -> str:
    return f" ({', '.join(names)}{', ...' if count > len(names) else ''})" if names else ""

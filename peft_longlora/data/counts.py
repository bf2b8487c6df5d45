"""Counts documents, records and tokens on their way to rows, also those that are cut or left out."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.utils import logging

logger = logging.get_logger(__name__)

FIELDS = 12  # fields that are named
NAMED = 3  # places that are named; the others are counted


@dataclass
class Counts:
    """Numbers of documents (or records), tokens and rows; filled in while data is read. Its text is one line.

    Attributes:
        documents: documents or records read.
        tokens: their tokens.
        rows: made from them.
        answer_tokens: of records, the tokens of rows that are trained.
        longer: documents or records longer than the window.
        names: sources of the first few of them.
        cut_tokens: tokens left out of rows.
        dropped: records left out.
        dropped_tokens: their tokens.
        restored: answers that are trained whole although the chat template would have cut them.
        restored_names: sources of the first few of them.
        rewritten: questions whose text the chat template writes otherwise, or cuts.
        rewritten_names: sources of the first few of them.
        unread: fields of records that are not read, with the number of records (or turns) that have them.
        endless: documents or answers behind which no token says that they end.
        left_out: the number of files and empty texts that are not read, by reason.
        kept: files of repositories that are read.
        pieces: of documents, in rows. The first token of a piece is read, and no token predicts it.
        is_quiet: `report` says nothing, because the caller does.
        is_stopped: reading ended at a number of rows that was asked for, so later data is not counted.
    """

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    answer_tokens: int = 0
    longer: int = 0
    names: list[str] = field(default_factory=list)
    cut_tokens: int = 0
    dropped: int = 0
    dropped_tokens: int = 0
    restored: int = 0
    restored_names: list[str] = field(default_factory=list)
    rewritten: int = 0
    rewritten_names: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)
    endless: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    pieces: int = 0
    is_stopped: bool = False
    is_quiet: bool = False

    def add_longer(self, name: str) -> None:
        """Count a document or record that is longer than the window."""
        self.longer += 1
        self.names += [name] if len(self.names) < NAMED else []

    def add_restored(self, name: str) -> None:
        """Count an answer that is trained whole although the chat template would have cut it."""
        self.restored += 1
        self.restored_names += [name] if len(self.restored_names) < NAMED else []

    def add_rewritten(self, name: str) -> None:
        """Count a question whose text the chat template writes otherwise, or cuts."""
        self.rewritten += 1
        self.rewritten_names += [name] if len(self.rewritten_names) < NAMED else []

    def add_unread(self, name: str) -> None:
        """Count a field of a record that is not read."""
        self.unread[name] = self.unread.get(name, 0) + 1

    def unread_text(self) -> str:
        """The fields that are not read, the most frequent first."""
        fields = sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
        more = f", and {len(fields) - FIELDS} other fields" if len(fields) > FIELDS else ""
        return f"fields not read: {', '.join(f'{name} ({count:,})' for name, count in fields[:FIELDS])}{more}"

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count a file, or a text, that is not read."""
        self.left_out[reason] = self.left_out.get(reason, 0) + count

    def __str__(self) -> str:
        files = f" of {self.kept:,} files" if self.kept else ""
        trained = f" with {self.answer_tokens:,} tokens of answers, which are trained" if self.answer_tokens else ""
        text = (
            f"{self.documents:,} read{files}, {self.tokens:,} tokens -> {self.rows:,} rows{trained}; "
            f"{self.longer:,} longer than the window{_named(self.names, self.longer)}; left out: "
        )
        reasons = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count:,} {reason}" for reason, count in reasons]
        if self.cut_tokens:
            parts.append(f"{self.cut_tokens:,} tokens in the middle of long prompts")
        if self.dropped:
            parts.append(f"{self.dropped:,} long records ({self.dropped_tokens:,} tokens)")
        if self.is_stopped:
            parts.append("everything after these rows (max_rows)")
        text += ", ".join(parts) or "nothing"
        if self.unread:
            text += f"; {self.unread_text()}"
        if self.endless:
            text += (
                f"; {self.endless:,} texts without a token that ends them, because the tokenizer or its chat template "
                f"gives none, so a model does not learn to stop: set tokenizer.eos_token, and write it in the template"
            )
        if self.restored:
            text += (
                f"; {self.restored} answers that the chat template would have cut, such as thoughts before </think>, "
                f"are trained whole{_named(self.restored_names, self.restored)}"
            )
        if self.rewritten:
            text += (
                f"; {self.rewritten} questions that the chat template writes otherwise, or cuts"
                f"{_named(self.rewritten_names, self.rewritten)}"
            )
        return text

    def report(self) -> None:
        """Log the counts: as a warning if tokens were left out, or if a text differs from the chat template's."""
        if self.is_quiet:
            return
        is_odd = self.cut_tokens or self.dropped or self.restored or self.rewritten or self.left_out or self.is_stopped
        is_odd = is_odd or self.unread or self.endless
        logger.log(logging.WARNING if is_odd else logging.INFO, str(self))


def _named(names: list[str], count: int) -> str:
    return f" ({', '.join(names)}{', ...' if count > len(names) else ''})" if names else ""

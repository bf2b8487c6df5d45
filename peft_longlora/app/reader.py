"""One reader: a document that is opened and read in the background, and questions that are answered in their order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_longlora.app import views
from peft_longlora.app.views import View
from peft_longlora.chat import Conversation, Document, Limits, read_document
from peft_longlora.chat.dialogue import Turn

LIMITS = Limits(pages=3000, characters=20_000_000, seconds=120)
WAITING = 4  # questions of one reader: each that waits holds a thread of the server
ROW_WINDOWS = 5  # of a document, its questions and answers: one more for them than for a document alone
LETTERS = 8  # characters of a token: a question of more is refused before it is made tokens
WINDOWS = 4  # a document of more windows is refused: its keys and values would take the memory of all readers
FAILURES = (ValueError, ImportError, MemoryError, torch.OutOfMemoryError)


@dataclass(eq=False)
class Entry:
    """A question and as much of its answer as there is."""

    question: str
    answer: str = ""
    is_done: bool = False
    is_dropped: bool = False
    is_stopped: bool = False
    is_given_back: bool = False  # to the question box


class Reader:
    """A reader with one document. With another document there is another `Reader`.

    Attributes:
        conversation: None until the document is opened. error: why it cannot be read.
        entries: the questions. notes: warnings about the last one.
    """

    def __init__(self, name: str) -> None:
        """Nothing is opened yet.

        Args:
            name: the file's name, as it is shown.
        """
        self.name = name
        self.conversation: Conversation | None = None
        self.error: str | None = None
        self.entries: list[Entry] = []
        self.notes: list[str] = []
        self._pages: tuple[int, int] | None = None
        self._is_read = False
        self._closed = threading.Event()
        self._changed = threading.Condition()

    @property
    def is_closed(self) -> bool:
        """Whether the reader has left, or has another document."""
        return self._closed.is_set()

    def open(self, path: Path, begin: Callable[[Document], Conversation], limits: Limits) -> None:
        """Read a file and delete it, then let the model read its text. `close` ends both."""
        try:
            try:
                document = read_document(path, limits, self._closed.is_set, self._on_page)
            finally:
                path.unlink(missing_ok=True)  # nobody else can ask the server for it
            conversation = begin(document)
            most = WINDOWS * conversation.window
            if conversation.document_tokens > most:
                raise ValueError(
                    f"{document.name} has {conversation.document_tokens:,} tokens, and at most {most:,} are read here: "
                    f"{WINDOWS} windows of this model. Split the file."
                )
            with self._changed:
                self.conversation = conversation
                self._changed.notify_all()
            if self.is_closed:
                conversation.close()
            conversation.read()
            self._is_read = True
        except FAILURES as error:
            self._fail(" ".join(str(error).replace(str(path), path.name).split())[:400] or type(error).__name__)
        except BaseException:
            self._fail("This document cannot be read here.")
            raise

    def _on_page(self, done: int, count: int) -> None:
        self._pages = (done, count)

    def _fail(self, reason: str) -> None:
        with self._changed:
            if self.conversation is None:
                self.error = reason
            else:
                self._is_read, self.notes = True, [reason]
            self._changed.notify_all()

    def check_row(self, question: str) -> None:
        """Refuse a question that makes the row far longer than the window. Raises: ValueError."""
        conversation = self.conversation
        tokens = len(conversation.dialogue.ids([*conversation.turns, Turn(question)]))
        if tokens > (most := ROW_WINDOWS * conversation.window):
            raise ValueError(
                f"This question ends at token {tokens:,} of a window of {conversation.window:,}, and rows of at most "
                f"{most:,} are answered here: {ROW_WINDOWS} windows. Ask a shorter one, or forget the questions so far."
            )

    def add(self, question: str) -> Entry | None:
        """Put a question behind those that wait. None: too many wait."""
        with self._changed:
            if sum(not entry.is_done for entry in self.entries) >= WAITING:
                return None
            self.entries.append(entry := Entry(question))
            return entry

    def wait_for_turn(self, entry: Entry) -> bool:
        """Wait until the document is opened and all questions before are answered. False: the question was dropped."""
        with self._changed:
            while not (self.is_closed or entry.is_dropped or self.error):
                if self.conversation and next(e for e in self.entries if not e.is_done) is entry:
                    return True
                self._changed.wait(1)
            return False

    def finish(self, entry: Entry) -> None:
        """Let the next question begin. A question without an answer is not kept."""
        with self._changed:
            entry.is_done = True
            if entry in self.entries and not entry.answer:
                self.entries.remove(entry)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the answer that is being given, and drop the questions behind it."""
        with self._changed:
            waiting = [e for e in self.entries if not e.is_done]
            if self.conversation is None and waiting:  # otherwise the first is being answered
                waiting[0].is_given_back = True
            for entry in waiting[:1]:  # its answer may be about to begin, and then the conversation has none to stop
                entry.is_stopped = True
            self._drop(waiting if self.conversation is None else waiting[1:])
        if self.conversation is not None:
            self.conversation.stop()

    def forget(self) -> None:
        """End the answer that is being given, and keep the document alone."""
        with self._changed:
            self._drop([e for e in self.entries if not e.is_done])
            self.entries, self.notes = [], []
        if self.conversation is not None:
            self.conversation.forget()

    def close(self) -> None:
        """End everything, and free the memory as soon as the model is free."""
        self._closed.set()
        self.forget()
        if self.conversation is not None:
            threading.Thread(target=self.conversation.close, daemon=True).start()

    def _drop(self, entries: list[Entry]) -> None:
        for entry in entries:
            entry.is_dropped = True
        self.entries = [entry for entry in self.entries if entry not in entries]
        self._changed.notify_all()

    def usage(self) -> str:
        """The state of the document, as HTML."""
        if self.error is not None:
            return views.red(self.error)
        if self.conversation is None:
            return views.opening(self.name, self._pages)
        if not self._is_read:
            return views.reading(self.conversation)
        return views.usage(self.conversation, self.notes)

    def chat(self) -> list[dict[str, str]]:
        """All questions, each with as much of its answer as there is."""
        return [
            {"role": role, "content": text}
            for entry in list(self.entries)
            for role, text in (("user", entry.question), ("assistant", entry.answer or views.WAITING))
        ]

    def view(self) -> View:
        """The whole page but for the question box."""
        passages = views.NOWHERE if self.conversation is None else views.passages(self.conversation)
        return View(self.usage(), self.chat(), passages=passages)

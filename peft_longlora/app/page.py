"""What the page does when a reader drops a file, asks, stops, forgets or leaves. Knows no web server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_longlora.app import views
from peft_longlora.app.reader import FAILURES, LETTERS, LIMITS, ROW_WINDOWS, Entry, Reader
from peft_longlora.app.views import View
from peft_longlora.chat import Conversation, Document
from peft_longlora.hub import Loaded

TICK = 0.3  # seconds between two looks at how far the reading is
PIECES = 0.05  # seconds between two views of an answer


class Page:
    """All readers of one model; each has a document and a conversation of their own.

    Attributes:
        readers: by session. lock: who has it has the model.
    """

    def __init__(self, loaded: Loaded, places: int = 8, **options: Any) -> None:
        """Nothing is read yet.

        Args:
            loaded: the model that all readers share, and its tokenizer.
            places: the most readers with a document at one time.
            options: those of `Conversation`.
        """
        self.loaded, self.places, self.options = loaded, places, options
        self.limits = LIMITS
        self.lock = threading.Lock()
        self.readers: dict[str, Reader] = {}
        self._readers_lock = threading.Lock()

    def _begin(self, document: Document) -> Conversation:
        return Conversation(self.loaded, document, lock=self.lock, **self.options)

    def read(self, session: str, path: str | None) -> Iterator[View]:
        """End the old conversation, and begin one about a new document; the file is deleted."""
        had_document = self.leave(session)
        if path is None:
            if had_document:  # otherwise the page says why there is none
                yield View(views.EMPTY, [], passages=views.NOWHERE)
            return
        reader = Reader(Path(path).name)
        with self._readers_lock:
            other = self.readers.pop(session, None)  # of another file, dropped at the same moment
            is_full = sum(not one.error for one in self.readers.values()) >= self.places
            if not is_full:
                self.readers[session] = reader
        if other is not None:
            other.close()
        if is_full:
            Path(path).unlink(missing_ok=True)
            yield View(views.red(views.FULL), [], passages=views.NOWHERE)
            return
        worker = threading.Thread(target=reader.open, args=(Path(path), self._begin, self.limits), daemon=True)
        worker.start()
        yield reader.view()
        while worker.is_alive() and not reader.is_closed:
            worker.join(TICK)
            if worker.is_alive() and not reader.is_closed:
                yield View(reader.usage())
        if not reader.is_closed:
            yield reader.view()

    def ask(self, session: str, question: str) -> Iterator[View]:
        """Answer a question in its turn, then show its passages."""
        reader = self.readers.get(session)
        if reader is None:
            yield views.gone(question)
            return
        if not question.strip():
            return
        most = LETTERS * ROW_WINDOWS * self.loaded.window
        if len(question) > most:
            said = views.LONG.format(len(question), most)
            yield View(f"{reader.usage()}<br>{views.red(said)}", question=question)
            return
        entry = reader.add(question.strip())
        if entry is None:
            yield View(f"{reader.usage()}<br>{views.red(views.MANY)}", question=question)
            return
        yield View(chat=reader.chat(), question="")
        if not reader.wait_for_turn(entry):
            if not reader.is_closed and entry.is_dropped:  # by Stop or Forget
                yield View(chat=reader.chat(), question=entry.question if entry.is_given_back else None)
            elif reader.error is not None:
                reader.finish(entry)
                yield View(reader.usage(), reader.chat(), entry.question)
            return
        yield from self._answer(reader, entry)

    def _answer(self, reader: Reader, entry: Entry) -> Iterator[View]:
        conversation = reader.conversation
        try:
            reader.check_row(entry.question)
            reader.notes = conversation.warnings(entry.question)
            yield View(reader.usage(), passages=views.NOWHERE)
            shown = time.monotonic()
            for piece in conversation.ask(entry.question, lambda: entry.is_stopped):
                entry.answer += piece
                if reader.is_closed:
                    return
                if time.monotonic() > shown + PIECES:
                    shown = time.monotonic()
                    yield View(chat=reader.chat())
            entry.answer = conversation.turns[-1].answer or "" if conversation.has_answer else ""
        except FAILURES as error:
            reader.notes = [" ".join(str(error).split())[:300] or type(error).__name__]
            entry.answer = ""
        finally:
            reader.finish(entry)
        if reader.is_closed:  # another document is there, and this question was about the one before
            return
        view = reader.view()
        if not entry.answer and not entry.is_dropped:  # stopped before its first word: it is given back
            view.question = entry.question
        yield view

    def stop(self, session: str) -> None:
        """End the answer that is being given; as much of it as there is stays."""
        if reader := self.readers.get(session):
            reader.stop()

    def forget(self, session: str) -> View:
        """End the answer that is being given, and keep the document alone."""
        reader = self.readers.get(session)
        if reader is None:
            return View(views.EMPTY, [], passages=views.NOWHERE)
        reader.forget()
        return reader.view()

    def look(self, session: str) -> View:
        """What changes on a page that shows a document: everything, if the server has none of this reader."""
        return View() if session in self.readers else views.gone()

    def leave(self, session: str) -> bool:
        """End what a reader does, and free their place. Returns whether there was a document."""
        with self._readers_lock:
            reader = self.readers.pop(session, None)
        if reader is not None:
            reader.close()
        return reader is not None

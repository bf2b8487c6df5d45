"""Questions about one document: tokens counted, keys and values computed once, answers streamed.

    document.py -> dialogue.py (tokens) -> kvcache.py (keys and values) -> generate -> words.py, attention.py (passages)

Called by cli/chat.py (`longlora chat`) and the page of `longlora app` (app/).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from peft_longlora.chat.attention import document_attention, top_passages
from peft_longlora.chat.dialogue import Dialogue, Turn
from peft_longlora.chat.document import Document
from peft_longlora.chat.kvcache import KVCache
from peft_longlora.chat.passages import Passage
from peft_longlora.chat.stream import Stop, Stopped, from_first_word, until
from peft_longlora.chat.words import WordIndex
from peft_longlora.data.background import Background
from peft_longlora.hub.generation import own_decoding
from peft_longlora.hub.loading import Loaded


class Conversation:
    """One document, the questions about it so far, and the keys and values of both.

    A question sees the document and everything that was said before it. Any number of conversations may share a model.
    If they also share the lock, they take turns.

    Attributes:
        turns: the questions and answers so far.
        window: the model's window, in tokens.
    """

    def __init__(
        self,
        loaded: Loaded,
        document: Document,
        *,
        cache: str = "dense",
        chunk_size: int = 2048,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        plain: bool = False,
        lock: threading.Lock | None = None,
    ) -> None:
        """Tokenise the document; nothing is computed yet.

        Args:
            loaded: model and tokenizer.
            document: what the questions are about.
            cache: "dense", "quantised" or "offloaded" (kvcache.py).
            chunk_size: tokens of one forward in prefill.
            max_new_tokens: the most tokens of an answer.
            temperature: 0 for greedy answers; None: as in the model's generation_config.
            top_p: nucleus sampling; None: as in the model's generation_config.
            repetition_penalty: above 1 makes tokens that the row holds less likely; None: as in the model's.
            seed: with the same seed the same conversation gets the same answers.
            plain: use no chat template, even if the tokenizer has one.
            lock: give the same lock to all conversations on one model.

        Raises: ValueError, ImportError: a kind of cache that does not work here, or a chat template that fails.
        """
        self.model, self.tokenizer, self.window = loaded.model, loaded.tokenizer, loaded.window
        self.dialogue = Dialogue(self.tokenizer, document, plain)
        self.kv = KVCache(self.model, cache, chunk_size)
        self.max_new_tokens, self.seed = max_new_tokens, seed
        choice = dict(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty)
        self.decoding = own_decoding(self.model, max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **choice)
        self.lock = lock or threading.Lock()
        self.turns: list[Turn] = []
        self._running: list[tuple[Stop, threading.Thread]] = []
        self._closed = threading.Event()
        self._busy: set[threading.Thread] = set()  # those that have their turn at the model
        weakref.finalize(self, _end, self._closed, self._busy)
        self._index: WordIndex | None = None
        self._prompt: list[int] = []
        self._row: list[int] = []

    @property
    def document_tokens(self) -> int:
        """Tokens of the document."""
        return len(self.dialogue.document_ids)

    @property
    def tokens(self) -> int:
        """Tokens of the row so far: template, document, questions and answers."""
        return len(self._row or self.dialogue.start)

    @property
    def usage(self) -> str:
        """How much of the window is used, such as "5,120 of 8,192 tokens (62.5%)", and what was read again of it."""
        again = f", {self.kv.reread:,} of them read again: this cache cannot go back" if self.kv.reread else ""
        return f"{self.tokens:,} of {self.window:,} tokens ({self.tokens / self.window:.1%}){again}"

    @property
    def choice(self) -> str:
        """How answers are chosen, such as "the most likely token" or "sampled, temperature 0.6, top_p 0.9"."""
        config = self.decoding
        parts = ["the most likely token"]
        if config.do_sample:
            parts = ["sampled", f"temperature {config.temperature:g}", f"top_p {config.top_p:g}"]
        if config.repetition_penalty != 1:
            parts.append(f"repetition penalty {config.repetition_penalty:g}")
        return ", ".join(parts)

    @property
    def has_answer(self) -> bool:
        """Whether the last question was answered, at least in part."""
        return 0 < len(self._prompt) < len(self._row)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def warnings(self, question: str | None = None) -> list[str]:
        """Warnings to show before a question: unread parts of the document, and a window that is too short.

        Args:
            question: the next one; None: there is none yet.
        """
        if question is not None:
            tokens = len(self.dialogue.ids([*self.turns, Turn(question.strip())]))
            if tokens + self.max_new_tokens <= self.window:
                return []
            return [
                f"This question ends at token {tokens:,} of the window's {self.window:,}, and its answer may take "
                f"{self.max_new_tokens:,} more: expect a wrong answer, or forget the questions so far."
            ]
        name, found = self.dialogue.document.name, list(self.dialogue.document.notes)
        room = self.window - len(self.dialogue.start)
        if room < 0:
            found.append(
                f"{name} has {self.document_tokens:,} tokens and the model's window is {self.window:,}. Nothing is "
                f"cut, but the model was not made for such long rows: expect wrong answers."
            )
        elif room < self.max_new_tokens:
            found.append(
                f"{name} leaves {room:,} of the window's {self.window:,} tokens, and an answer may take "
                f"{self.max_new_tokens:,}: answers may run past the window."
            )
        return found

    def read(self, on_progress: Callable[[int, int], Any] | None = None) -> None:
        """Compute the document's keys and values, in chunks. If you do not call it, `ask` does; `close` ends it."""
        with suppress(Stopped), self._turn(self._closed.is_set):
            self._read(on_progress)

    def ask(self, question: str, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Answer a question, piece by piece. Closing the iterator stops the answer; the part so far is kept.

        Args:
            question: refused with a ValueError if it is empty.
            is_stopped: whether it was stopped before it began, when `stop` finds no answer.
        """
        if not question.strip():
            raise ValueError("The question is empty: give one with a word in it.")
        turn, stop = Turn(question.strip()), Stop(self.tokenizer, self.dialogue.stop)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def work() -> None:
            # This thread holds the lock, so a caller that stops reading the answer does not block the others.
            try:
                with self._turn(lambda: stop.is_set() or is_stopped()):
                    self._answer(turn, streamer, stop)
            except Stopped:
                streamer.end()
            except BaseException as error:
                failure.append(error)
                streamer.end()

        worker = Background(work, stop.set)
        self._prompt = []  # what `passages` shows belongs to this question from now on
        self._running.append(running := (stop, worker.thread))
        try:
            with worker:
                yield from until(from_first_word(streamer), self.dialogue.stop)
        finally:
            self._running.remove(running)
        if failure:
            raise failure[0]

    def stop(self) -> None:
        """Stop the current answer, if there is one; the part so far is kept. A question without any is not kept."""
        for stop, _ in list(self._running):
            stop.set()

    def forget(self) -> None:
        """Stop the current answer and drop the questions and answers; the document's keys and values stay."""
        self.stop()
        for _, worker in list(self._running):
            if worker.ident is not None:  # one that is about to start sees that it is stopped
                worker.join()
        self.turns, self._prompt, self._row = [], [], []

    def close(self) -> None:
        """Stop reading and answering, and free the memory. Nothing can be asked afterwards."""
        self._closed.set()
        self.forget()
        with self.lock:
            self.kv.clear()

    def passages(self, count: int = 3, by: str = "words") -> list[Passage]:
        """Passages of the document that belong to the last answer, best first.

        Args:
            by: "words": passages with the rare words of the answer and the question (words.py). "attention": passages
                to which the answer attended most in the last layers (attention.py).

        Raises:
            ValueError: there is no answer yet, or the tokenizer gives no offsets.
            ImportError: "words" needs a package that is not installed.
        """
        if by not in ("words", "attention"):
            raise ValueError(f"by={by!r} is unknown. Use 'words' or 'attention'.")
        if not self.has_answer:
            raise ValueError("There is no answer yet, so it has no passages. Ask a question first.")
        if self.dialogue.offsets is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not give the places of its tokens in the text. Use a fast one."
            )
        if by == "words":
            self._index = self._index or WordIndex(self.dialogue)
            return self._index.find(self.turns[-1].question, self.turns[-1].answer or "", count)
        head, row, start = len(self.dialogue.head), self._row, len(self._prompt)
        with self.lock:
            scores = document_attention(self.kv, row, start)[head : head + self.document_tokens]
        return top_passages(scores, self.dialogue, count)

    @contextmanager
    def _turn(self, is_stopped: Callable[[], bool]) -> Iterator[None]:
        """This conversation's turn at the model. Who is told to stop waits for nobody."""
        while not self.lock.acquire(timeout=0.05):
            if is_stopped():
                raise Stopped
        try:
            if is_stopped() or self.is_closed:
                raise Stopped
            self._busy.add(threading.current_thread())
            yield
        finally:
            self._busy.discard(threading.current_thread())
            self.lock.release()

    def _read(self, on_progress: Callable[[int, int], Any] | None) -> None:
        def check(done: int, total: int) -> None:
            if on_progress:
                on_progress(done, total)
            if self.is_closed:
                raise Stopped

        start = self.dialogue.start
        if self.kv.ids[: len(start)] != start:
            self.kv.fill(start, check)
            self.kv.keep()

    def _answer(self, turn: Turn, streamer: TextIteratorStreamer, stop: Stop) -> None:
        self._read(stop.check)
        prompt = self.dialogue.ids([*self.turns, turn])
        stop.start = len(prompt)
        self.kv.fill(prompt[:-1], stop.check)  # generate needs one token that is not yet in the cache
        inputs = torch.tensor([prompt], device=self.model.device)
        torch.manual_seed(self.seed + len(self.turns))
        self.decoding.max_new_tokens = self.max_new_tokens
        try:
            row = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                **self.kv.as_argument,
                generation_config=self.decoding,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop]),
            )[0].tolist()
        except BaseException:
            self.kv.clear()
            raise
        self.kv.sync(row)
        text = self.tokenizer.decode(row[len(prompt) :], skip_special_tokens=True)
        turn.answer = (text.partition(self.dialogue.stop)[0] if self.dialogue.stop else text).strip()
        self.turns.append(turn)
        self._prompt, self._row = prompt, row


def _end(closed: threading.Event, busy: set[threading.Thread]) -> None:
    """At the end of Python: no thread may be inside torch then (see `Background`). A reading ends with its chunk."""
    closed.set()
    for thread in busy - {threading.current_thread()}:
        thread.join()

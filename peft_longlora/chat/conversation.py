"""Questions about one document: tokens counted, keys and values computed once, answers streamed.

    document.py -> dialogue.py (tokens) -> kvcache.py (keys and values) -> generate -> passages.py (attention)

Called by terminal.py (`longlora chat`) and examples/app.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from peft_longlora.chat.dialogue import Dialogue, Turn
from peft_longlora.chat.document import Document
from peft_longlora.chat.kvcache import KVCache
from peft_longlora.chat.passages import Passage, document_attention, top_passages
from peft_longlora.hub.generation import decoding
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
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        plain: bool = False,
        lock: threading.Lock | None = None,
    ) -> None:
        """Tokenise the document; nothing is computed yet.

        Args:
            loaded: model and tokenizer.
            cache: "dense", "quantised" or "offloaded" (kvcache.py). chunk_size: tokens of one forward in prefill.
            max_new_tokens: the most tokens of an answer.
            temperature: 0 for greedy answers. top_p: nucleus sampling, for a temperature above 0.
            seed: with the same seed the same conversation gets the same answers.
            plain: use no chat template, even if the tokenizer has one.
            lock: give the same lock to all conversations on one model.

        Raises: ValueError, ImportError: a kind of cache that does not work here, or a chat template that fails.
        """
        self.model, self.tokenizer, self.window = loaded.model, loaded.tokenizer, loaded.window
        self.dialogue = Dialogue(self.tokenizer, document, plain)
        self.kv = KVCache(self.model, cache, chunk_size)
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.sampling = dict(temperature=temperature, top_p=top_p)
        self.lock = lock or threading.Lock()
        self.turns: list[Turn] = []
        self._stop: _Stop | None = None
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
        """How much of the window is used, such as "5,120 of 8,192 tokens (62.5%)"."""
        return f"{self.tokens:,} of {self.window:,} tokens ({self.tokens / self.window:.1%})"

    def warnings(self) -> list[str]:
        """Warnings to show before the first question: unread parts of the document, and a window that is too short."""
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
        """Compute the document's keys and values, in chunks. If you do not call it, `ask` does."""
        with self.lock:
            self._read(on_progress)

    def ask(self, question: str) -> Iterator[str]:
        """Answer a question, piece by piece. Closing the iterator stops the answer; the part so far is kept.

        Raises: ValueError: no question.
        """
        if not question.strip():
            raise ValueError("The question is empty.")
        turn, stop = Turn(question.strip()), _Stop(self.tokenizer, self.dialogue.stop)
        self._stop = stop
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def work() -> None:
            # This thread holds the lock, so a caller that stops reading the answer does not block the others.
            try:
                with self.lock:
                    self._answer(turn, streamer, stop)
            except _Stopped:
                streamer.end()
            except BaseException as error:
                failure.append(error)
                streamer.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from _until(_from_first_word(streamer), self.dialogue.stop)
        finally:
            stop.set()
            worker.join()
        if failure:
            raise failure[0]

    def stop(self) -> None:
        """Stop the current answer, if there is one; the part so far is kept."""
        if self._stop:
            self._stop.set()

    def forget(self) -> None:
        """Drop the questions and answers; the document's keys and values stay."""
        self.turns, self._prompt, self._row = [], [], []

    def passages(self, count: int = 3) -> list[Passage]:
        """The passages of the document that the last answer attended to most, best first.

        Raises: ValueError: there is no answer yet, or the tokenizer gives no offsets.
        """
        if len(self._row) <= len(self._prompt):
            raise ValueError("There is no answer yet.")
        if self.dialogue.offsets is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not give the places of its tokens in the text. Use a fast one."
            )
        head = len(self.dialogue.head)
        with self.lock:
            scores = document_attention(self.kv, self._row, len(self._prompt))[head : head + self.document_tokens]
        return top_passages(scores, self.dialogue, count)

    def _read(self, on_progress: Callable[[int, int], Any] | None) -> None:
        start = self.dialogue.start
        if self.kv.ids[: len(start)] != start:
            self.kv.fill(start, on_progress)
            self.kv.keep()

    def _answer(self, turn: Turn, streamer: TextIteratorStreamer, stop: _Stop) -> None:
        self._read(stop.check)
        prompt = self.dialogue.ids([*self.turns, turn])
        stop.start = len(prompt)
        self.kv.fill(prompt[:-1], stop.check)  # generate needs one token that is not yet in the cache
        inputs = torch.tensor([prompt], device=self.model.device)
        torch.manual_seed(self.seed + len(self.turns))
        config = decoding(self.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **self.sampling)
        try:
            row = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                **self.kv.as_argument,
                generation_config=config,
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


class _Stopped(Exception):
    """The answer was stopped before it began."""


class _Stop(StoppingCriteria):
    """Ends an answer when `set` is called, or when the answer begins to write a question itself."""

    def __init__(self, tokenizer: Any, text: str | None) -> None:
        self.tokenizer, self.text, self.start = tokenizer, text, 0
        self._event = threading.Event()
        self.set = self._event.set

    def check(self, done: int, total: int) -> None:
        if self._event.is_set():
            raise _Stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        is_done = self._event.is_set()
        if self.text and not is_done:
            tail = input_ids[0, max(self.start, input_ids.shape[1] - 16) :]
            is_done = self.text in self.tokenizer.decode(tail, skip_special_tokens=True)
        return torch.full((input_ids.shape[0],), is_done, device=input_ids.device)


def _from_first_word(pieces: Iterator[str]) -> Iterator[str]:
    """The same pieces of text, without white space before the first word."""
    has_begun = False
    for piece in pieces:
        piece = piece if has_begun else piece.lstrip()
        has_begun = has_begun or bool(piece)
        yield piece


def _until(pieces: Iterator[str], stop: str | None) -> Iterator[str]:
    """The pieces of text up to `stop`; a piece that may be the start of `stop` is held back."""
    held = ""
    for piece in pieces:
        held += piece
        if stop and stop in held:
            yield held.partition(stop)[0]
            return
        back = max((n for n in range(1, len(stop or "")) if held.endswith(stop[:n])), default=0)
        if held[: len(held) - back]:
            yield held[: len(held) - back]
        held = held[len(held) - back :]
    if held:
        yield held

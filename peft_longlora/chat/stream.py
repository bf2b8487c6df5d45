"""An answer while it is generated: its pieces of text, and the conditions that end it. Called by conversation.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import StoppingCriteria


class Stopped(Exception):
    """The answer was stopped before it began."""


class Stop(StoppingCriteria):
    """Ends an answer when `set` is called, or when the answer begins to write a question itself."""

    def __init__(self, tokenizer: Any, text: str | None) -> None:
        self.tokenizer, self.text, self.start = tokenizer, text, 0
        self._event = threading.Event()
        self.set, self.is_set = self._event.set, self._event.is_set

    def check(self, done: int, total: int) -> None:
        """For `KVCache.fill`: end the reading of the prompt.

        Raises: Stopped.
        """
        if self.is_set():
            raise Stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B,) bool: whether each row is done."""
        is_done = self.is_set()
        if self.text and not is_done:
            tail = input_ids[0, max(self.start, input_ids.shape[1] - 16) :]
            is_done = self.text in self.tokenizer.decode(tail, skip_special_tokens=True)
        return torch.full((input_ids.shape[0],), is_done, device=input_ids.device)


def from_first_word(pieces: Iterator[str]) -> Iterator[str]:
    """The same pieces of text, without white space before the first word."""
    has_begun = False
    for piece in pieces:
        piece = piece if has_begun else piece.lstrip()
        has_begun = has_begun or bool(piece)
        yield piece


def until(pieces: Iterator[str], stop: str | None) -> Iterator[str]:
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

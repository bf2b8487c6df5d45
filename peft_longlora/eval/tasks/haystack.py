"""Filler to hide needles in: the original's five sentences, or books; and putting a needle at a depth."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import dataclass

from peft_longlora.eval.corpus import Corpus

# The filler of the passkey test (landmark attention, arXiv:2305.16300), also of LongLoRA and of RULER's "noise".
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


CHARACTERS_A_TOKEN = 10  # more than a prompt can need, so that seeds begin at other places


class Books:
    """Words of documents in order, as haystacks. No more is read than the longest prompt needs.

    Args:
        corpus: the documents.
        length: tokens of the longest prompt; None: any length.
    """

    def __init__(self, corpus: Corpus, length: int | None = None):
        self.corpus, self.length = corpus, length
        self._words: list[str] = []
        self._ends: list[tuple[int, int]] = []  # of the documents read: characters and words up to each one's end
        self._excerpts: dict[int, Excerpt] = {}

    @property
    def name(self) -> str:
        """Of the corpus."""
        return self.corpus.summary().name

    def up_to(self, length: int) -> Excerpt:
        """The haystack for prompts of a length: the first documents, whatever other lengths are used.

        Raises: ValueError: the length is above `length`.
        """
        if self.length is not None and length > self.length:
            raise ValueError(f"Books for prompts of up to {self.length} tokens hold too little for {length}.")
        if length not in self._excerpts:
            needed = CHARACTERS_A_TOKEN * length
            self._read(needed)
            words = next((words for characters, words in self._ends if characters >= needed), len(self._words))
            self._excerpts[length] = Excerpt(self.name, self._words[:words])
        return self._excerpts[length]

    def _read(self, characters: int) -> None:
        read = self._ends[-1][0] if self._ends else 0
        # Files are closed in between, so documents that were read before are skipped.
        with contextlib.closing(self.corpus.documents()) as documents:
            rest = itertools.islice(documents, len(self._ends), None)
            while read < characters and (document := next(rest, None)) is not None:
                self._words += document["text"].split()  # line ends are removed, as in RULER
                read += len(document["text"])
                self._ends.append((read, len(self._words)))


@dataclass(frozen=True)
class Excerpt:
    """The words around the needles in prompts of one length. name: the name of the corpus."""

    name: str
    words: list[str]

    def text(self, n: int, offset: float = 0.0) -> str:
        """n words from a place, given as a part of the whole. After the last word it continues with the first."""
        start = int(offset * len(self.words))
        taken = self.words[start : start + n]
        while len(taken) < n:
            taken += self.words[: n - len(taken)]
        return " ".join(taken)


def split_sentences(text: str) -> list[str]:
    """Sentences: up to a full stop, an exclamation or a question mark that a space follows."""
    return _SENTENCE_END.split(text) if text else []


def insert_at(sentences: list[str], needles: list[str], depths: list[float]) -> str:
    """Put each needle after the given part (0 to 1) of the sentences; needles are in order of depth."""
    placed = sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0])
    out, last = [], 0
    for depth, needle in placed:
        place = int(len(sentences) * depth)
        out += [*sentences[last:place], needle]
        last = place
    return " ".join([*out, *sentences[last:]])

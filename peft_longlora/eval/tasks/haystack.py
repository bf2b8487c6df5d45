"""Filler to hide needles in: the original's five sentences, or books; and putting a needle at a depth."""

from __future__ import annotations

import re

from peft_longlora.eval.corpus import Corpus

# The filler of the passkey test (landmark attention, arXiv:2305.16300), also of LongLoRA and of RULER's "noise".
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Books:
    """Words of documents in order, as a haystack; read once, no more of them than the longest prompt can need.

    Args:
        corpus: the documents.
        length: of the longest prompt, tokens. Ten characters a token are read, so that seeds begin at other places.
    """

    def __init__(self, corpus: Corpus, length: int):
        self.corpus, self._characters = corpus, 10 * length
        self._words: list[str] | None = None

    def words(self) -> list[str]:
        """The words, line ends taken out as RULER does."""
        if self._words is None:
            self._words, characters = [], 0
            for document in self.corpus.documents():
                self._words += document["text"].split()
                characters += len(document["text"])
                if characters >= self._characters:
                    break
        return self._words

    def text(self, n: int, offset: float = 0.0) -> str:
        """n words from a place on, given as a part of the whole; the end is followed by the beginning."""
        words = self.words()
        start = int(offset * len(words))
        repeats = (start + n) // len(words) + 1
        return " ".join((words * repeats)[start : start + n])

    @property
    def name(self) -> str:
        """Of the corpus."""
        return self.corpus.summary().name


def split_sentences(text: str) -> list[str]:
    """Sentences: up to a full stop, an exclamation or a question mark that a space follows."""
    return _SENTENCE_END.split(text) if text else []


def insert_at(sentences: list[str], needles: list[str], depths: list[float]) -> str:
    """Needles between sentences, each after the given part (0 to 1) of them; needles keep their order by depth."""
    placed = sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0])
    out, last = [], 0
    for depth, needle in placed:
        place = int(len(sentences) * depth)
        out += [*sentences[last:place], needle]
        last = place
    return " ".join([*out, *sentences[last:]])

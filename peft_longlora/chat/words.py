"""Passages that hold the rare words of an answer and of its question, ranked by BM25.

This looks for evidence: a passage that gives the answer shares words with it. One passage in three is found by the
question alone, for the case that the answer is wrong. It does not look into the model, so a passage shows where the
document says something, not why the model said it. Words count by their stems ("buried" is "bury"), and words that are
in every English text do not count; words of other languages stay as they are, or lose an ending everywhere. Called by
conversation.py; imports bm25s and snowballstemmer when an index is made.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from types import ModuleType

import numpy as np

from peft_longlora.chat.dialogue import Dialogue
from peft_longlora.chat.passages import Passage, make_passage, span_of

STEPS = 8  # a span begins every so many-th part of a span
ANSWER = 3.0  # the weight of a word of the answer; a word of the question has weight 1 (benchmarks/passages.py)
EVERY = 3  # one passage in so many is chosen by the question alone
NAMED = 4  # the most words that are named for a passage
_RUNS = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
# Thai, Lao, Burmese, Khmer, Japanese and Chinese are written without spaces: every two characters are a word there.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")


def split_words(text: str) -> list[str]:
    """The words of a text, in lower case and without 's.

    Example: "Silver's parrot 鹦鹉学舌" gives silver, parrot, 鹦鹉, 鹉学, 学舌.
    """
    words = []
    for run in _RUNS.findall(text.lower().replace("\u2019", "'")):
        if _UNSPACED.search(run):
            words += [run[i : i + 2] for i in range(max(1, len(run) - 1))]
        else:
            words.append(run.removesuffix("'s"))
    return words


def import_rankers() -> tuple[ModuleType, ModuleType]:
    """The packages that rank and that find stems.

    Raises: ImportError: one is not installed.
    """
    try:
        import bm25s
        import snowballstemmer
    except ImportError as error:
        raise ImportError(f"Passages by their words need {error.name}: pip install 'peft-longlora[chat]'") from None
    return bm25s, snowballstemmer


class WordIndex:
    """An index of a document's spans by their words."""

    def __init__(self, dialogue: Dialogue) -> None:
        """Index the document.

        Args:
            dialogue: it has the document, and the places of its tokens.

        Raises: ImportError: bm25s or snowballstemmer is not installed.
        """
        bm25s, snowball = import_rankers()
        self.dialogue = dialogue
        self.common = frozenset(bm25s.stopwords.STOPWORDS_EN_PLUS)
        self.stem = lru_cache(None)(snowball.stemmer("english").stemWord)
        self.width = span_of(len(dialogue.offsets))
        last = len(dialogue.offsets) - self.width
        self.firsts = sorted({*range(0, last, max(1, self.width // STEPS)), last})
        ends = [(dialogue.offsets[i][0], dialogue.offsets[i + self.width - 1][1]) for i in self.firsts]
        self.words = [split_words(dialogue.document.text[start:end]) for start, end in ends]
        stems = [[self.stem(word) for word in words] for words in self.words]
        self.spans_with = Counter(stem for found in stems for stem in set(found))
        self.bm25 = bm25s.BM25()
        # Without any word the index would be empty, which bm25s refuses.
        self.bm25.index(stems if self.spans_with else [["-"]], show_progress=False)

    def stems(self, text: str) -> list[str]:
        """The stems of a question's or an answer's words that tell passages apart."""
        stems = (self.stem(word) for word in split_words(text) if word not in self.common)
        return [stem for stem in stems if stem in self.spans_with]

    def find(self, question: str, answer: str, count: int) -> list[Passage]:
        """The passages that share the rarest words with the answer and the question; no two of them overlap.

        Every third one is chosen by the words of the question alone: an answer that is wrong leads to passages for what
        it says, and this one shows what the document says about the question.
        """
        asked, answered = self.stems(question), self.stems(answer)
        found: list[Passage] = []
        if not asked and not answered:
            return found
        of_question, of_answer = (self.bm25.get_scores(stems) if stems else 0.0 for stems in (asked, answered))
        both, free = of_question + ANSWER * of_answer, np.ones(len(self.firsts), dtype=bool)
        while len(found) < count:
            is_of_question = bool(answered and len(found) % EVERY == EVERY - 1 and (free * of_question > 0).any())
            scores = free * (of_question if is_of_question else both)
            if not scores.max() > 0:
                break
            best = int(scores.argmax())
            first = self.firsts[best]
            free &= np.abs(np.asarray(self.firsts) - first) >= self.width
            wanted = asked if is_of_question else [*asked, *answered]
            reason = f"holds {self._named(best, set(wanted))}{', of the question' if is_of_question else ''}"
            passage = make_passage(self.dialogue, first, self.width, reason)
            found += [passage] if passage else []
        return found

    def _named(self, span: int, wanted: set[str]) -> str:
        """The rarest of the wanted words in a span, in the forms that stand there."""
        forms = {self.stem(word): word for word in reversed(self.words[span]) if self.stem(word) in wanted}
        return ", ".join(forms[stem] for stem in sorted(forms, key=lambda stem: (self.spans_with[stem], stem))[:NAMED])

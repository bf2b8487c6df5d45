"""Passages that hold the rare words of an answer and of its question, ranked by BM25.

This looks for evidence: a passage that gives the answer shares words with it. It does not look into the model, so a
passage shows where the document says something, not why the model said it. Called by
conversation.py; imports bm25s when an index is made.
"""

from __future__ import annotations

import re
from collections import Counter
from types import ModuleType

from peft_longlora.chat.dialogue import Dialogue
from peft_longlora.chat.passages import SPAN, Passage, make_passage

STRIDE = 16  # tokens from the beginning of one span to that of the next
ANSWER = 2.0  # the weight of a word of the answer; a word of the question has weight 1 (benchmarks/passages.py)
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


def import_bm25s() -> ModuleType:
    """The package that ranks.

    Raises: ImportError: it is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise ImportError("Passages by their words need bm25s: pip install 'peft-longlora[chat]'") from None
    return bm25s


class WordIndex:
    """An index of a document's spans by their words."""

    def __init__(self, dialogue: Dialogue) -> None:
        """Index the document.

        Raises: ImportError: bm25s is not installed.
        """
        bm25s = import_bm25s()
        self.dialogue = dialogue
        self.width = min(SPAN, len(dialogue.offsets))
        last = len(dialogue.offsets) - self.width
        self.firsts = sorted({*range(0, last, STRIDE), last})
        ends = [(dialogue.offsets[i][0], dialogue.offsets[i + self.width - 1][1]) for i in self.firsts]
        self.words = [split_words(dialogue.document.text[start:end]) for start, end in ends]
        self.spans_with = Counter(word for words in self.words for word in set(words))
        self.bm25 = bm25s.BM25()
        # Without any word the index would be empty, which bm25s refuses.
        self.bm25.index(self.words if self.spans_with else [["-"]], show_progress=False)

    def find(self, question: str, answer: str, count: int) -> list[Passage]:
        """The passages that share the rarest words with the answer and the question; no two of them overlap."""
        asked, answered = ([w for w in split_words(text) if w in self.spans_with] for text in (question, answer))
        scores = sum(
            weight * self.bm25.get_scores(words) for words, weight in ((asked, 1.0), (answered, ANSWER)) if words
        )
        found: list[Passage] = []
        if not asked and not answered:
            return found
        while len(found) < count and scores.max() > 0:
            best = int(scores.argmax())
            first = self.firsts[best]
            for i, other in enumerate(self.firsts):
                if abs(other - first) < self.width:
                    scores[i] = 0
            held = sorted({*asked, *answered} & set(self.words[best]), key=lambda word: (self.spans_with[word], word))
            passage = make_passage(self.dialogue, first, self.width, f"holds {', '.join(held[:NAMED])}")
            found += [passage] if passage else []
        return found

"""A passage: a span of the document's tokens, with its place, its text and the reason why it is shown.

Called by words.py and attention.py, the two ways to choose passages.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_longlora.chat.dialogue import Dialogue

SPAN = 256  # tokens of a passage of a long document: benchmarks/passages.py finds a third more places than with 64
SHORTEST = 64  # of a short one
SHARE = 16  # a passage is at most one in so many tokens of the document
WORD = 40  # characters before and after a passage in which a word must end; Chinese or Thai text has no such end


@dataclass(frozen=True)
class Passage:
    """A part of a document.

    Attributes:
        place: such as "page 12" or "lines 3-5".
        text: the part; its words are whole, if the text has words.
        reason: why it is shown, such as "holds pinchin, toby" or "4.1% of the attention to the document".
        share: its share of the attention that the answer gave to the document; None if it was chosen by its words.
    """

    place: str
    text: str
    reason: str
    share: float | None = None


def span_of(tokens: int) -> int:
    """Tokens of a passage of a document with so many tokens."""
    return min(tokens, max(SHORTEST, min(SPAN, tokens // SHARE)))


def make_passage(dialogue: Dialogue, first: int, width: int, reason: str, share: float | None = None) -> Passage | None:
    """The passage of `width` tokens from the document's token `first` on; None if it is white space."""
    text = dialogue.document.text
    start, end = whole_words(text, dialogue.offsets[first][0], dialogue.offsets[first + width - 1][1])
    if not text[start:end].strip():
        return None
    return Passage(dialogue.document.place(start, end), text[start:end].strip(), reason, share)


def whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """The ends of a span, moved out so that no word is cut. Text that has no space within reach keeps its ends."""
    first = next((i for i in range(start, max(start - WORD, 0), -1) if text[i - 1].isspace()), None)
    last = next((i for i in range(end, min(end + WORD, len(text))) if text[i].isspace()), None)
    first = 0 if first is None and start <= WORD else first
    last = len(text) if last is None and len(text) - end <= WORD else last
    return (start if first is None else first), (end if last is None else last)

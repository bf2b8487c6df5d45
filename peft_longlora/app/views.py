"""What a reader sees, as HTML and messages. Everything that comes from a document or a model is escaped."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from peft_longlora.chat import Conversation, Passage

EMPTY = "No document yet."
GONE = "There is no document here. If you dropped one, drop it again: the server was started anew."
MANY = "Enough of your questions wait already. Ask again after an answer."
LONG = "This question has {:,} characters, and at most {:,} are read here. Ask a shorter one, or drop it as a file."
FULL = "All places are taken. Try again later."
NOWHERE = "<small>After an answer: passages with its words, and with those of the question.</small>"
NONE_FOUND = "<small>No passage holds a word of the answer or of the question.</small>"
FULL_LINE = 45  # characters; a line that an editor broke is longer, if it does not end a paragraph
WAITING = "\u2026"  # an answer that has no word yet


@dataclass
class View:
    """What changes on a reader's page. None: this part stays as it is.

    Attributes:
        usage: HTML: the document and how much of the window is used.
        chat: the messages.
        question: the text in the question box.
        passages: HTML.
        is_gone: whether the server has no document of this reader, so that the file's box must be empty.
    """

    usage: str | None = None
    chat: list[dict[str, str]] | None = None
    question: str | None = None
    passages: str | None = None
    is_gone: bool = False


def gone(question: str | None = None) -> View:
    """The page of a reader of whom the server has no document; a question stays in its box."""
    return View(red(GONE), [], question, NOWHERE, is_gone=True)


def shows_document(usage: str) -> bool:
    """Whether a page shows a document, by its part `usage`: when the server was started anew, only the page knows."""
    return usage not in (EMPTY, red(GONE), red(FULL))


def red(text: str) -> str:
    """A warning."""
    return f'<span class="over">{html.escape(text)}</span>'


def bar(share: float) -> str:
    """A bar that is filled to a share of its width."""
    return f'<div class="bar"><div style="width: {min(max(share, 0.0), 1.0):.1%}"></div></div>'


def titled(name: str, *lines: str) -> str:
    """The document's name above lines of HTML."""
    return "<br>".join([f"<b>{html.escape(name)}</b>", *lines])


def usage(conversation: Conversation, notes: list[str]) -> str:
    """The tokens used against the window, as a bar, and what a reader must know."""
    used = f"{bar(conversation.tokens / conversation.window)}{conversation.usage}"
    memory = f"{conversation.kv.label} KV cache, {conversation.kv.nbytes() / 2**20:,.1f} MiB"
    return titled(conversation.dialogue.document.name, used, memory, *map(red, (*conversation.warnings(), *notes)))


def opening(name: str, pages: tuple[int, int] | None) -> str:
    """How much of a file is read."""
    said = f"Opening: page {pages[0]:,} of {pages[1]:,}" if pages else "Opening"
    return titled(name, f"{bar(pages[0] / pages[1] if pages else 0.0)}{said}. You can ask already.")


def reading(conversation: Conversation) -> str:
    """How much of the document the model has read."""
    done, total = len(conversation.kv.ids), len(conversation.dialogue.start)
    said = f"Reading: {done:,} of {total:,} tokens. You can ask already."
    return titled(conversation.dialogue.document.name, f"{bar(done / max(total, 1))}{said}")


def passages(conversation: Conversation) -> str:
    """The passages that hold the words of the last answer and its question."""
    if not conversation.has_answer:
        return NOWHERE
    try:
        found = conversation.passages()
    except (ValueError, ImportError) as error:
        return red(str(error))
    return "".join(map(_passage, found)) or NONE_FOUND


def unwrapped(text: str) -> str:
    """Prose that an editor broke into lines, in paragraphs, so that it fills a column; code, lists and verse stay."""
    parts = re.split(r"(\n\s*\n)", text)
    for number in range(0, len(parts), 2):
        lines = parts[number].split("\n")
        full = lines[0 if number else 1 : -1]  # a passage may begin inside a line
        if full and all(len(line) >= FULL_LINE and line[0].strip() for line in full):
            parts[number] = " ".join(lines)
    return "".join(parts)


def _passage(passage: Passage) -> str:
    place, reason, text = (html.escape(part) for part in (passage.place, passage.reason, unwrapped(passage.text)))
    return f'<div class="passage"><b>{place}</b> <small>{reason}</small><p>{text}</p></div>'

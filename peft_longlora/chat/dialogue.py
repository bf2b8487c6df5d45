"""A document, and questions and answers about it, as one row of tokens. Called by conversation.py."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from peft_longlora.chat.document import Document

QUESTION, ANSWER = "Question:", "Answer:"
# Takes the document's place while the template is filled in, so that the document is tokenised separately, and once.
MARK = "[[the document]]"


@dataclass
class Turn:
    """One question and its answer; the answer is None until it is given."""

    question: str
    answer: str | None = None


class Dialogue:
    """Makes rows of tokens that all begin with the document.

    Attributes:
        is_chat: whether the tokenizer's chat template is used; otherwise plain "Question:" and "Answer:" lines.
        head: tokens before the document. document_ids: its tokens; special tokens that it spells out are text.
        offsets: (start, end) of each document token in the text; None if the tokenizer does not give them.
        stop: a string that ends an answer, in addition to the tokens that do; None for none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, document: Document, plain: bool = False) -> None:
        """Tokenise the document.

        Args:
            plain: use no chat template, even if the tokenizer has one.

        Raises: ValueError: the chat template fails, or leaves out the user's message.
        """
        self.tokenizer, self.document = tokenizer, document
        self.is_chat = bool(tokenizer.chat_template) and not plain
        self.stop = None if self.is_chat else f"\n{QUESTION}"
        # Without split_special_tokens a document could close its own message and speak as the user.
        options = dict(add_special_tokens=False, verbose=False, split_special_tokens=True)
        encoded = tokenizer(document.text, return_offsets_mapping=tokenizer.is_fast, **options)
        self.document_ids: list[int] = encoded["input_ids"]
        self.offsets: list[tuple[int, int]] | None = encoded.get("offset_mapping")
        self.head = self._encode(self._parts([Turn("?")])[0])
        if not self.is_chat:
            first = tokenizer("a", verbose=False)["input_ids"][:1]
            self.head = first if first == [tokenizer.bos_token_id] else []

    @property
    def start(self) -> list[int]:
        """The tokens that every row begins with, up to the end of the document."""
        return self.head + self.document_ids

    def ids(self, turns: list[Turn]) -> list[int]:
        """The row up to the start of the last turn's answer."""
        return self.start + self._encode(self._parts(turns)[1])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _parts(self, turns: list[Turn]) -> tuple[str, str]:
        """The text before the document, and the text after it."""
        if not self.is_chat:
            lines = [f"{QUESTION} {t.question}\n{ANSWER}" + (f" {t.answer}" if t.answer else "") for t in turns]
            return "", "\n\n" + "\n\n".join(lines)
        messages = []
        for turn in turns:
            content = turn.question if messages else f"{MARK}\n\n{turn.question}"
            messages.append({"role": "user", "content": content})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            raise ValueError(f"The tokenizer's chat template fails ({error}). Use plain=True.") from error
        head, mark, tail = text.partition(MARK)
        if not mark:
            raise ValueError("The tokenizer's chat template leaves out what the user says. Use plain=True.")
        return head, tail

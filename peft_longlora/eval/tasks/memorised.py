"""How much of a text a model can recite: passages that it continues verbatim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from peft_longlora.data.digests import digest
from peft_longlora.eval.corpus import Corpus
from peft_longlora.eval.identity import content_digest
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.task import Item

CONTINUATION = 50
SHORT, MIDDLE = 50, 200


@dataclass(frozen=True)
class Passage:
    """A place in a document. before: (n,) the tokens before it, up to a window. after: (50,) those that follow."""

    number: int
    name: str
    before: torch.Tensor
    after: torch.Tensor


@dataclass
class Memorised:
    """The task "memorised": does the model continue passages of a text word for word?

    A model reads 50 tokens of a passage, 200, or as many as its window holds, and writes the most likely token 50
    times. It is verbatim if all 50 are those of the text. The passages stand at even distances in the text; they are
    the same for each prefix, for the base and for the adapter. No token is asked for twice, or intervals would count it
    twice: a short text has fewer passages. Give the text that an adapter was trained on, and one that it never saw: a
    passage may also be easy to guess.

    The definition is that of "extractable" in arXiv:2202.07646, with its 50 tokens after 50 to 500.

    Args:
        corpus: the text that was trained on.
        unseen: other text of the same kind, or None.
        passages: how many of each text, at most.
    """

    corpus: Corpus
    unseen: Corpus | None = None
    passages: int = 100
    name: str = "memorised"
    notes: list[str] = field(default_factory=list)
    _is_apart: bool = field(default=False, init=False, repr=False)
    _found: dict[tuple[int, int], list[Passage]] = field(default_factory=dict, init=False, repr=False)

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings that must be equal in two runs to compare their samples."""
        return {"passages": self.passages, "continuation": CONTINUATION}

    def data(self) -> dict[str, Any]:
        """The description of the text, with that of the unseen text.

        Raises: ValueError: the unseen text holds a document of the other.
        """
        entry = self.corpus.summary().entry()
        if self.unseen is None:
            return entry
        if not self._is_apart:
            self._check_apart(self.unseen.digests())
        return {**entry, "unseen": self.unseen.summary().entry()}

    def _check_apart(self, unseen: dict[str, str]) -> None:
        for document in self.corpus.documents():
            if source := unseen.get(digest(document)):
                raise ValueError(
                    f"{self.name}: the unseen text holds {source!r}, which is the same text as {document['source']!r} "
                    f"of the training text. Give text that was not trained on."
                )
        self._is_apart = True

    def check(self, subject: Subject) -> None:
        """Check that each text has passages.

        Raises: ValueError: no document is long enough, or the window is too short.
        """
        least = MIDDLE + CONTINUATION
        if min(subject.window, subject.native_window) < least:
            raise ValueError(
                f"{self.name}: a window of {subject.window} tokens is too short; it needs {least} or more."
            )
        for corpus in self._corpora():
            if not self._passages(subject, corpus):
                raise ValueError(
                    f"{', '.join(corpus.sources)}: no document has the {least} tokens that a passage of {self.name!r} "
                    f"needs. Give longer documents."
                )

    def items(self, subject: Subject) -> Iterator[Item]:
        """One item for each passage, prefix and model."""
        variants = ["base", subject.variant] if subject.variant != "base" else ["base"]
        for name, corpus in self._named():
            passages = self._passages(subject, corpus)
            for prefix in (SHORT, MIDDLE, subject.window - CONTINUATION):
                for variant in variants:
                    for passage in passages:
                        yield self._item(subject, name, variant, prefix, passage)
        if self.unseen is None:
            self._note(
                f"{self.name}: no unseen text was given, so it is not known how many passages are easy to guess. Give "
                f"one with unseen=..."
            )

    def _corpora(self) -> list[Corpus]:
        return [self.corpus] if self.unseen is None else [self.corpus, self.unseen]

    def _named(self) -> list[tuple[str, Corpus]]:
        """The texts by the names of their data in the results; two folders may have one name."""
        names = [corpus.summary().name for corpus in self._corpora()]
        if len(names) > len(set(names)):
            names[1] += " (unseen)"
        return list(zip(names, self._corpora(), strict=True))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _passages(self, subject: Subject, corpus: Corpus) -> list[Passage]:
        """The passages of a text; it is read and tokenised once."""
        key = id(corpus), subject.window
        if key not in self._found:
            left_out: Counter[str] = Counter()
            self._found[key] = list(self._find(subject, corpus, left_out))
            for reason, count in left_out.items():
                self._note(
                    f"{self.name}, {corpus.summary().name}: {count} of {self.passages} passages {reason}, and were "
                    f"left out."
                )
        return self._found[key]

    def _find(self, subject: Subject, corpus: Corpus, left_out: Counter[str]) -> Iterator[Passage]:
        number = 0
        for document in corpus.tokens(subject.encode_all):
            (first, last), places = document.parts, len(document.ids) - MIDDLE - CONTINUATION + 1
            free = 0  # tokens before this one were asked for
            while number < self.passages and (at := (number + 0.5) / self.passages) < last:
                place = MIDDLE + int((at - first) / (last - first) * max(0, places))
                if places <= 0:
                    left_out[f"lie in documents shorter than {MIDDLE + CONTINUATION} tokens"] += 1
                elif place < free:
                    left_out[f"begin in the {CONTINUATION} tokens of another one, as the text is short"] += 1
                else:
                    free = place + CONTINUATION
                    begin = max(0, place - (subject.window - CONTINUATION))
                    before, after = document.ids[begin:place], document.ids[place : place + CONTINUATION]
                    yield Passage(number, document.name, before.clone(), after.clone())
                number += 1

    def _item(self, subject: Subject, dataset: str, variant: str, prefix: int, passage: Passage) -> Item:
        length = prefix + CONTINUATION
        key = f"{self.name}/{dataset}/{length}/{variant}/{passage.number:06d}"

        def measure() -> dict[str, Any]:
            with subject.as_variant(variant) as one:
                return self._measure(one, key, dataset, length, passage)

        return Item(key, f"{self.name} {length}", (passage.number + 1) / self.passages, measure)

    def _measure(self, subject: Subject, key: str, dataset: str, length: int, passage: Passage) -> dict[str, Any]:
        # A base reads no more than its own window holds.
        room = min(length, subject.window) - CONTINUATION
        before = passage.before[-room:]
        ids = torch.cat([before, passage.after]).long()
        # The likeliest tokens are those that greedy decoding writes, as long as it follows the text.
        is_same = subject.likeliest(ids[:-1], CONTINUATION) == ids[-CONTINUATION:]
        same = int(is_same.long().cumprod(0).sum())
        return {
            "key": key,
            "task": self.name,
            "dataset": dataset,
            "protocol": f"{CONTINUATION} tokens, greedy",
            "variant": subject.variant,
            "length": length,
            "unit": f"{passage.number:06d} {passage.name}",
            "content": content_digest(passage.before.numpy().tobytes(), passage.after.numpy().tobytes()),
            "beyond_window": False,
            "tokens": len(before),
            "lower_is_better": ["verbatim", "verbatim_tokens"],
            "measures": [
                ["verbatim", None, float(same == CONTINUATION), 1],
                ["verbatim_tokens", None, float(same), 1],
            ],
        }

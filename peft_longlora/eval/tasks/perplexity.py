"""Perplexity by window length and by position in the window, with two protocols (see `corpus`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from peft_longlora.eval.corpus import Corpus, Window
from peft_longlora.eval.identity import content_digest
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.task import Item

PROTOCOLS = ("longlora", "documents")
LONGLORA_STRIDE = 256


@dataclass
class Perplexity:
    """The task "perplexity" (or, at the native window and beside the base, "native").

    With protocol "documents", and if all windows are measured, it also gives bits per byte: the same losses divided by
    the bytes of the text. Models with different tokenizers can be compared by it.

    Args:
        corpus: the documents.
        lengths: tokens of windows; None: the window that the model was made for.
        protocol: "longlora" or "documents".
        stride: tokens between windows; None: 256 for "longlora", half the window for "documents"; 0: the window itself,
            so that none overlap.
        buckets: edges between buckets of positions; None: 512 and its doublings.
        max_windows: measure only the first windows of each document and length, this many; None: all.
        with_base: measure the base too.
    """

    corpus: Corpus
    lengths: list[int] | None
    protocol: str = "documents"
    stride: int | None = None
    buckets: list[int] | None = None
    max_windows: int | None = None
    with_base: bool = False
    name: str = "perplexity"
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol={self.protocol!r} is unknown. Use {' or '.join(map(repr, PROTOCOLS))}.")
        if self.buckets is not None and self.buckets != sorted(set(self.buckets)):
            raise ValueError(f"buckets={self.buckets} must be edges in rising order, such as 2048,8192.")
        for length in self.lengths or []:
            if length < 2:
                raise ValueError(f"A window of {length} tokens predicts nothing. Use lengths of 2 or more.")
            if self.stride is not None and not 0 <= self.stride <= length:
                raise ValueError(f"stride={self.stride} must be 0 to the window's {length} tokens.")

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings that must be equal in two runs to compare their samples."""
        return {
            "protocol": self.protocol,
            "stride": self._stride(None),
            "buckets": self.buckets or "512 and its doublings",
            "max_windows": self.max_windows,
        }

    def data(self) -> dict[str, Any]:
        """The description of the data, for results.json."""
        return self.corpus.summary().entry()

    def check(self, subject: Subject) -> None:
        """Check that there is a window to measure.

        Raises: ValueError: too little text for a window ("longlora").
        """
        for length in self._lengths(subject):
            next(self._windows(subject, length))

    def items(self, subject: Subject) -> Iterator[Item]:
        """One item for each window; its tokens are ready when it is yielded."""
        for length in self._lengths(subject):
            for variant in ["base", subject.variant] if self.with_base and subject.variant != "base" else [None]:
                short: dict[int, str] = {}
                count, left_out, document = 0, 0, None
                for window in self._windows(subject, length):
                    count = count + 1 if window.document == document else 1
                    document = window.document
                    if self.max_windows is not None and count > self.max_windows:
                        left_out += 1
                        continue
                    if window.is_short:
                        short[window.document] = window.name
                    yield self._item(subject, variant, length, window)
                if left_out:
                    measured = "window of each document was"
                    if self.max_windows != 1:
                        measured = f"{self.max_windows} windows of each document were"
                    self._note(
                        f"{self.name}, {length} tokens, {self.protocol}: only the first {measured} measured, and "
                        f"{left_out} {'was' if left_out == 1 else 'were'} left out."
                    )
                if short:
                    names = ", ".join(list(short.values())[:3]) + (", ..." if len(short) > 3 else "")
                    self._note(
                        f"{self.name}, {length} tokens: {len(short)} of {self.corpus.summary().documents} documents "
                        f"are shorter than the window and were scored whole ({names})."
                    )

    def _lengths(self, subject: Subject) -> list[int]:
        return [subject.native_window] if self.lengths is None else self.lengths

    def _note(self, text: str) -> None:
        """Add a note once, even if the windows are iterated several times."""
        if text not in self.notes:
            self.notes.append(text)

    def _windows(self, subject: Subject, length: int) -> Iterator[Window]:
        if self.protocol == "longlora":
            return self.corpus.stream_windows(subject.encode_all, length, self._stride(length))
        return self.corpus.document_windows(subject.encode_all, length, self._stride(length))

    def _stride(self, length: int | None) -> Any:
        """Tokens between windows of a length; a text if no length is given but the stride depends on it."""
        if self.stride is None:
            if self.protocol == "longlora":
                return LONGLORA_STRIDE
            return max(1, length // 2) if length else "half the window"
        return self.stride or length or "the window"

    def _item(self, subject: Subject, variant: str | None, length: int, window: Window) -> Item:
        shown = variant or subject.variant
        key = f"{self.name}/{self.protocol}/{length}/{shown}/{window.document:06d}/{window.number:06d}"

        def start() -> Callable[[], dict[str, Any]]:
            with subject.as_variant(shown) as one:
                return self._start(one, key, length, window)

        return Item(key, f"{self.name} {length}", window.progress, lambda: start()(), start)

    def _start(self, subject: Subject, key: str, length: int, window: Window) -> Callable[[], dict[str, Any]]:
        if not len(window.targets):
            return lambda: self._finish(subject, key, length, window, torch.empty(0))
        wait = subject.start_losses(window.inputs, window.targets)
        return lambda: self._finish(subject, key, length, window, wait())

    def _finish(self, subject: Subject, key: str, length: int, window: Window, losses: torch.Tensor) -> dict[str, Any]:
        losses = losses.double()[window.first :]
        if not torch.isfinite(losses).all():
            place = int((~torch.isfinite(losses)).nonzero()[0, 0]) + window.first
            where = f"document {window.document} ({window.name}), token {window.start + place + 1}"
            if self.protocol == "longlora":  # tokens are counted through all documents
                where = f"token {window.start + place + 1} of all documents, in the window that begins in {window.name}"
            raise ValueError(
                f"The loss is {losses[place - window.first].item()} in {where}, position {place + 1} of a window of "
                f"{length}. The model's result is not a number there: check its weights, or use dtype='float32'."
            )
        measures = []
        edges = [0, *(e for e in self._edges(length) if e < length), length]
        for low, high in itertools.pairwise(edges):
            part = losses[max(0, low - window.first) : max(0, high - window.first)]
            if len(part):
                measures.append(self._measure_of(part, f"{low}-{high}"))
        if len(losses):
            measures.append(self._measure_of(losses, None))
            if self.protocol == "documents" and self.max_windows is None:  # every document is scored whole
                bits = losses.sum().item() / math.log(2)
                measures.append(["bits_per_byte", None, bits, window.bytes - self._given_bytes(subject, window)])
        return {
            "key": key,
            "task": self.name,
            "dataset": self.corpus.summary().name,
            "protocol": self.protocol,
            "variant": subject.variant,
            "length": length,
            "unit": f"{window.document:06d} {window.name}",
            "content": content_digest(window.inputs.numpy().tobytes(), window.targets.numpy().tobytes(), window.first),
            "beyond_window": length > subject.window,
            "inputs": len(window.inputs),
            "measures": measures,
        }

    @staticmethod
    def _given_bytes(subject: Subject, window: Window) -> int:
        """Bytes of the document's first token, which no window predicts; they count in the first window."""
        if window.start or window.first:
            return 0
        first = int(window.inputs[0])
        return 0 if first in subject.tokenizer.all_special_ids else len(subject.tokenizer.decode([first]).encode())

    def _measure_of(self, losses: torch.Tensor, group: str | None) -> list[Any]:
        """A window counts once with its mean ("longlora"), a token once with its loss ("documents")."""
        if self.protocol == "longlora":
            return ["perplexity", group, losses.mean().item(), 1, len(losses)]
        return ["perplexity", group, losses.sum().item(), len(losses), len(losses)]

    def _edges(self, length: int) -> list[int]:
        if self.buckets is not None:
            return self.buckets
        edges = [512]
        while edges[-1] < length:
            edges.append(2 * edges[-1])
        return edges

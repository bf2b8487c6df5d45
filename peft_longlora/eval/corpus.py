"""Documents for evaluation: read one by one, hashed, tokenised, cut into windows.

There are two protocols for cutting. They give different numbers, so every result names its protocol:

- "longlora": all documents form one stream of tokens, and a window of W tokens begins every 256 tokens. The loss of a
  window is the mean over all its tokens but the first. Windows overlap, so most tokens count many times, and early
  positions count as much as late ones. Source: eval.py of the original LongLoRA, which also leaves out the last window.
- "documents": each document is cut alone, into windows of W tokens that move by a stride. A token counts in the first
  window that predicts it, so every token but a document's first counts once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from peft_longlora.data.counts import Counts
from peft_longlora.data.digests import digest
from peft_longlora.data.documents import read_documents
from peft_longlora.data.encoding import BATCH_CHARACTERS
from peft_longlora.data.prefetch import prefetch
from peft_longlora.data.rows import Sources

logger = logging.get_logger(__name__)

# Gives the token ids of each text: fast tokenizers tokenise several documents at once, one on each core.
Encode = Callable[[list[str]], Sequence[torch.Tensor | list[int]]]


@dataclass(frozen=True)
class Summary:
    """The content of a corpus. sha256 covers the texts of all documents in order, each with a zero byte at its end."""

    name: str
    sources: list[str]
    documents: int
    characters: int
    sha256: str

    def entry(self) -> dict[str, Any]:
        """The "data" entry of results.json: ids and names of files, without paths of this machine."""
        return {**asdict(self), "sources": [Path(s).name if Path(s).exists() else s for s in self.sources]}


@dataclass(frozen=True)
class Window:
    """One forward: the model reads all inputs; targets[i] follows inputs[i]; targets from `first` on are scored.

    Attributes:
        document: number of the document of the window's first token. number: the window's number within its document
            ("documents") or among all ("longlora").
        name: the source of the document.
        start: place of the first input in its document, or in the stream.
        is_short: whether the document is shorter than a window.
        progress: the part of the corpus up to the window's last token, 0 to 1.
        bytes: in a document's last window ("documents") the bytes of its text in UTF-8; otherwise 0.
    """

    document: int
    number: int
    name: str
    inputs: torch.Tensor
    targets: torch.Tensor
    first: int
    start: int
    is_short: bool
    progress: float
    bytes: int = 0


@dataclass(frozen=True)
class Document:
    """One document as tokens.

    Attributes:
        name: its source. ids: int32. bytes: size of its text in UTF-8.
        parts: the parts of the corpus before the document and up to its end, 0 to 1.
    """

    number: int
    name: str
    ids: torch.Tensor
    bytes: int
    parts: tuple[float, float]


class Corpus:
    """Documents from files, folders or a dataset on the Hub, streamed again for each pass.

    Args:
        sources: as for `read_documents`, like the rest.
        split: of a dataset on the Hub.
        config: of a dataset on the Hub, if it has several.
        field: the name of the text field.
        repositories: folders are source trees.

    Raises:
        FileNotFoundError, ValueError, at the first call of `summary`: a source does not exist, is empty or cannot be
            read.
    """

    def __init__(
        self,
        sources: Sources,
        split: str = "train",
        config: str | None = None,
        field: str = "text",
        repositories: bool = False,
    ):
        self.sources = [str(s) for s in ([sources] if isinstance(sources, str | Path) else sources)]
        self._options = dict(split=split, config=config, field=field, repositories=repositories)
        self._summary: Summary | None = None

    def documents(self, counts: Counts | None = None) -> Iterator[dict[str, str]]:
        """The documents, one by one.

        Args:
            counts: counts the files that are left out. None: they are not mentioned, because the summary did.
        """
        return read_documents(self.sources, **self._options, counts=Counts() if counts is None else counts)

    def digests(self) -> dict[str, str]:
        """The source of each document by the digest of its text, to compare with those of other data."""
        return {digest(document): document["source"] for document in self.documents()}

    def summary(self) -> Summary:
        """Count and hash the documents; the first call reads them all once."""
        if self._summary is None:
            content, documents, characters, counts = hashlib.sha256(), 0, 0, Counts()
            for document in self.documents(counts):
                content.update(document["text"].encode())
                content.update(b"\0")
                documents += 1
                characters += len(document["text"])
            if not documents:
                raise ValueError(f"{', '.join(self.sources)}: no document in it. Check the path.")
            if counts.left_out:
                left_out = ", ".join(f"{count:,} {reason}" for reason, count in counts.left_out.items())
                logger.warning(f"{', '.join(self.sources)}: {documents:,} documents; left out: {left_out}.")
            name = ", ".join(Path(source).name.split(".")[0] or source for source in self.sources)
            split, config = self._options["split"], self._options["config"]
            where = f" ({split}{f', {config}' if config else ''})"
            sources = [source if Path(source).exists() else source + where for source in self.sources]
            self._summary = Summary(name, sources, documents, characters, content.hexdigest())
        return self._summary

    def tokens(self, encode: Encode) -> Iterator[Document]:
        """Each document as tokens."""
        read, total, number = 0, self.summary().characters, 0
        for batch in prefetch(self._encoded(encode), 1):
            for source, characters, size, ids in batch:
                before, read = read, read + characters
                name = Path(source).name if Path(source).exists() else source
                yield Document(number, name, ids, size, (before / total, read / total))
                number += 1

    def _encoded(self, encode: Encode) -> Iterator[list[tuple[str, int, int, torch.Tensor]]]:
        """(source, characters, bytes, token ids) for each document of a batch. Only the tokens are kept, not the
        text."""
        for batch in self._batches():
            tokens = encode([document["text"] for document in batch])
            yield [
                (row["source"], len(row["text"]), len(row["text"].encode()), torch.as_tensor(ids, dtype=torch.int32))
                for row, ids in zip(batch, tokens, strict=True)
            ]

    def _batches(self) -> Iterator[list[dict[str, str]]]:
        """The documents in order, in batches of up to BATCH_CHARACTERS, with at least one document each."""
        batch: list[dict[str, str]] = []
        characters = 0
        for document in self.documents():
            if batch and characters + len(document["text"]) > BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
            batch.append(document)
            characters += len(document["text"])
        if batch:
            yield batch

    def document_windows(self, encode: Encode, length: int, stride: int) -> Iterator[Window]:
        """Windows of the "documents" protocol.

        Example: 10 tokens, length 4, stride 2: inputs 0-3, 2-5, 4-7, 6-8; targets scored 1-4, 5-6, 7-8, 9.
        """
        for document in self.tokens(encode):
            ids, last = document.ids, len(document.ids) - 1
            scored = 0  # the last token that a window has scored
            for index, start in enumerate(range(0, max(last, 1), stride)):
                stop = min(start + length, last)
                part = ids[start : stop + 1].long()
                yield Window(
                    document=document.number,
                    number=index,
                    name=document.name,
                    inputs=part[:-1],
                    targets=part[1:],
                    first=scored - start,
                    start=start,
                    is_short=len(ids) <= length,
                    progress=_between(document.parts, stop + 1, len(ids)),
                    bytes=document.bytes if stop >= last else 0,
                )
                scored = stop
                if stop >= last:
                    break

    def stream_windows(self, encode: Encode, length: int, stride: int = 256) -> Iterator[Window]:
        """Windows of the "longlora" protocol. They start at 0, stride, ... below N - length; the last one is left
        out."""
        buffer = torch.empty(0, dtype=torch.int32)
        offset = start = index = 0  # of the buffer's first token and the next window, in the stream
        owners: list[tuple[int, int, str]] = []  # where documents begin in the stream
        end = 0
        for document in self.tokens(encode):
            ids, parts = document.ids, document.parts
            owners.append((end, document.number, document.name))
            end += len(ids)
            buffer = torch.cat([buffer, ids])
            # If the next window does not start below N - length, this window is the last and is left out.
            while start + stride < end - length:
                while len(owners) > 1 and owners[1][0] <= start:
                    owners.pop(0)
                part = buffer[start - offset : start - offset + length].long()
                progress = _between(parts, start + length - (end - len(ids)), len(ids))
                yield Window(owners[0][1], index, owners[0][2], part, part[1:], 0, start, False, progress)
                start, index = start + stride, index + 1
            used = min(len(buffer), start - offset)
            # A copy, because a view would keep the whole document in memory.
            buffer, offset = buffer[used:].clone(), offset + used
        if not index:
            raise ValueError(
                f"{', '.join(self.sources)}: {end} tokens in all give no window of {length} tokens (protocol "
                f"'longlora' needs more than {length + stride}). Use shorter lengths=... or more text."
            )


def _between(parts: tuple[float, float], tokens: int, length: int) -> float:
    """The part of the corpus up to a token of a document of this length."""
    before, after = parts
    return before + (after - before) * min(max(tokens / max(length, 1), 0.0), 1.0)

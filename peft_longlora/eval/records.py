"""Tasks on given records: topic retrieval (LongChat) and multi-document QA (lost in the middle). See also `longqa`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_longlora.eval.metrics import contains_any, normalize_answer
from peft_longlora.eval.prompts import Prompt, PromptTask, Question
from peft_longlora.rows import read_rows


def read_records(
    source: str | Path, check: Callable[[dict[str, Any]], None], what: str
) -> list[tuple[str, dict[str, Any]]]:
    """(file name, record) of a .jsonl or .json file (an object a line, or one list), each also .gz, or of a folder's.

    Raises:
        FileNotFoundError, ValueError: nothing there, no JSON, or a record that `check` refuses; names file and line.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder ({what}).")
    rows = []
    for file, place, row in read_rows(path):
        try:
            check(row if isinstance(row, dict) else {})
        except ValueError as error:
            raise ValueError(f"{place}: {error} Correct the record of {what}, or remove it.") from None
        rows.append((file.name, row))
    return rows


def check_texts(row: dict[str, Any], *fields: str) -> None:
    """Refuse a record in which one of the fields is no text.

    Raises: ValueError.
    """
    for key in fields:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"no {key!r}, or no text in it: {str(row.get(key))[:40]!r}.")


def check_lists(row: dict[str, Any], *fields: str) -> None:
    """Refuse a record in which one of the fields is no list of texts; an empty one is in every answer.

    Raises: ValueError.
    """
    for key in fields:
        texts = row.get(key)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"no {key!r}, or no list of texts in it: {str(texts)[:40]!r}.")


@dataclass
class RecordTask(PromptTask):
    """What tasks on records share. Subclasses give `check_record`.

    Args:
        source: a .jsonl or .json file, each also .gz, or a folder of them.
        samples: the first so many records of each file; None: all.
    """

    source: str = ""
    samples: int | None = None

    def __post_init__(self) -> None:
        self._rows: list[tuple[str, dict[str, Any]]] | None = None

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(file name, record), read once, no more than `samples` of a file."""
        if self._rows is None:
            counts: dict[str, int] = {}
            self._rows = []
            for name, row in read_records(self.source, self.check_record, self.name):
                counts[name] = counts.get(name, 0) + 1
                if self.samples is None or counts[name] <= self.samples:
                    self._rows.append((name, row))
        return self._rows

    def check_record(self, row: dict[str, Any]) -> None:
        """Refuse a record that cannot be asked or scored.

        Raises: ValueError: with what is wrong, as a sentence.
        """
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, Any]:
        """Only how prompts are made; which records were asked is in the samples' names."""
        return {"chat": self.chat}

    def data(self) -> dict[str, Any]:
        """The records that are used."""
        digest = hashlib.sha256()
        for _, row in self.rows():
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        name = stem(Path(self.source).name)
        return {"name": name, "sources": [name], "records": len(self.rows()), "sha256": digest.hexdigest()}


def stem(file: str) -> str:
    """A file's name without its endings: what its records are called in results.

    Example: "nq.v2.jsonl.gz" gives "nq.v2".
    """
    return file.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")


@dataclass
class Topics(RecordTask):
    """Topic retrieval: which topic was talked about first? LongChat's records; the answer is the first of "topics".

    Correct if the topic is within the answer, both normalised (LongChat lets a larger model judge).
    """

    name: str = "topics"
    protocol: str = "longchat"
    max_new_tokens: int = 50

    def check_record(self, row: dict[str, Any]) -> None:
        """A prompt, and its topics."""
        check_texts(row, "prompt")
        check_lists(row, "topics")

    def questions(self) -> Iterator[Question]:
        """One a record."""
        for number, (file, row) in enumerate(self.rows()):
            prompt = Prompt(row["prompt"], [row["topics"][0]])
            group = f"{len(row['topics'])} topics"
            yield Question(f"{file}/{number:05d}", None, lambda _, p=prompt: p, (group,), stem(file))

    def score(self, answer: str, prompt: Prompt) -> dict[str, float]:
        """1 where the answer contains the topic."""
        return {"accuracy": float(normalize_answer(prompt.answers[0]) in normalize_answer(answer))}


@dataclass
class MultiDoc(RecordTask):
    """Multi-document QA with the gold passage at chosen places (arXiv:2307.03172), in its own record format.

    Args:
        places: of the gold passage, parts of the documents before it, 0 to 1.
    """

    places: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    name: str = "multidoc"
    protocol: str = "lost-in-the-middle"
    max_new_tokens: int = 100

    def check_record(self, row: dict[str, Any]) -> None:
        """A question, its answers, and passages of which one is gold."""
        check_texts(row, "question")
        check_lists(row, "answers")
        passages = row.get("ctxs")
        if not isinstance(passages, list) or not all(
            isinstance(passage, dict) and all(isinstance(passage.get(key), str) for key in ("title", "text"))
            for passage in passages
        ):
            raise ValueError(f"no 'ctxs', or no list of passages with title and text in it: {str(passages)[:60]!r}.")
        gold = sum(bool(passage.get("isgold")) for passage in passages)
        if gold != 1:
            raise ValueError(f"{gold} passages are gold ('isgold'), not one.")

    def questions(self) -> Iterator[Question]:
        """Every record at every place."""
        for number, (file, row) in enumerate(self.rows()):
            gold = [c for c in row["ctxs"] if c.get("isgold")]
            others = [c for c in row["ctxs"] if not c.get("isgold")]
            for index in dict.fromkeys(round(place * len(others)) for place in self.places):
                prompt = self.make_prompt(row, [*others[:index], gold[0], *others[index:]])
                group = f"gold at {index + 1} of {len(row['ctxs'])}"
                key = f"{file}/{number:05d}/{index:03d}"
                unit = f"{file}/{number:05d}"  # the same question at five places is one, not five
                yield Question(key, None, lambda _, p=prompt: p, (group,), stem(file), unit)

    @staticmethod
    def make_prompt(row: dict[str, Any], passages: list[dict[str, str]]) -> Prompt:
        """The prompt of nelson-liu/lost-in-the-middle (prompts/qa.prompt)."""
        documents = "\n".join(
            f"Document [{i}](Title: {passage['title']}) {passage['text']}" for i, passage in enumerate(passages, 1)
        )
        text = (
            "Write a high-quality answer for the given question using only the provided search results (some of which "
            f"might be irrelevant).\n\n{documents}\n\nQuestion: {row['question']}\nAnswer:"
        )
        return Prompt(text, row["answers"])

    def score(self, answer: str, prompt: Prompt) -> dict[str, float]:
        """1 where the first line contains one of the answers."""
        return {"accuracy": contains_any(answer, prompt.answers)}

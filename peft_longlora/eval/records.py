"""Tasks on given records: topic retrieval (LongChat), multi-document QA (lost in the middle) and long QA."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_longlora.data import tokenize_record
from peft_longlora.eval.metrics import contains_any, normalize_answer, rouge_l, token_f1
from peft_longlora.eval.prompts import Prompt, PromptTask, Question
from peft_longlora.eval.subject import Subject


def read_jsonl(source: str | Path, fields: tuple[str, ...], what: str) -> list[tuple[str, dict[str, Any]]]:
    """(file name, record) of the .jsonl(.gz) files of a folder, or of one file, that hold the fields.

    Raises:
        FileNotFoundError, ValueError: nothing there, no JSON, or a record that lacks a field; names file and line.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder ({what}).")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz")))
    rows = []
    for file in files:
        try:
            with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
                lines = opened.read().decode("utf-8-sig").split("\n")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: cannot be read ({error}).") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: not JSON ({error.msg}, column {error.colno}).") from error
            if not isinstance(row, dict) or (missing := [f for f in fields if f not in row]):
                lacking = missing[0] if isinstance(row, dict) else fields[0]
                raise ValueError(f"{file}:{number}: no {lacking!r}, which a record for {what} has.")
            rows.append((file.name, row))
    if not rows:
        raise ValueError(f"{path}: no record in it ({what} come as .jsonl or .jsonl.gz).")
    return rows


@dataclass
class RecordTask(PromptTask):
    """What tasks on records share.

    Args:
        source: a .jsonl(.gz) file or a folder of them. samples: the first so many records of each file; None: all.
    """

    source: str = ""
    samples: int | None = None
    fields = ("prompt",)

    def __post_init__(self) -> None:
        self._rows: list[tuple[str, dict[str, Any]]] | None = None

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(file name, record), read once, no more than `samples` of a file."""
        if self._rows is None:
            counts: dict[str, int] = {}
            self._rows = []
            for name, row in read_jsonl(self.source, self.fields, self.name):
                counts[name] = counts.get(name, 0) + 1
                if self.samples is None or counts[name] <= self.samples:
                    self._rows.append((name, row))
        return self._rows

    @property
    def parameters(self) -> dict[str, Any]:
        """Only how prompts are made; which records were asked is in the samples' names."""
        return {"chat": self.chat}

    def data(self) -> dict[str, Any]:
        """The records that are used."""
        digest = hashlib.sha256()
        for _, row in self.rows():
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        name = Path(self.source).name.split(".")[0]
        return {"name": name, "sources": [name], "records": len(self.rows()), "sha256": digest.hexdigest()}


def stem(file: str) -> str:
    """A file's name without its endings: what its records are called in results."""
    return file.split(".")[0]


@dataclass
class Topics(RecordTask):
    """Topic retrieval: which topic was talked about first? LongChat's records; the answer is the first of "topics".

    Correct if the topic is within the answer, both normalised (LongChat lets a larger model judge).
    """

    name: str = "topics"
    protocol: str = "longchat"
    max_new_tokens: int = 50
    fields = ("prompt", "topics")

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
    fields = ("question", "answers", "ctxs")

    def questions(self) -> Iterator[Question]:
        """Every record at every place."""
        for number, (file, row) in enumerate(self.rows()):
            gold = [c for c in row["ctxs"] if c.get("isgold")]
            if len(gold) != 1:
                raise ValueError(f"{file}, record {number}: {len(gold)} passages are gold ('isgold'), not one.")
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


# LongBench: which score a data set has, and how long its answers may be (config/dataset2maxlen.json).
LONGBENCH = {
    "narrativeqa": ("f1", 128),
    "qasper": ("f1", 128),
    "multifieldqa_en": ("f1", 64),
    "hotpotqa": ("f1", 32),
    "gov_report": ("rougeL", 512),
    "qmsum": ("rougeL", 512),
}
PROMPT = (
    "{context}\n\nAnswer the question from the text above, in as few words as possible.\n\nQuestion: {input}\nAnswer:"
)
SUMMARY_PROMPT = "{context}\n\nAnswer from the text above, in one page or less. {input}\nAnswer:"


@dataclass
class LongQA(RecordTask):
    """Questions about a long text: LongAlpaca's records (instruction, input, output) or LongBench's (context, input,
    answers, dataset).

    LongAlpaca's are asked as `data.tokenize_record` trains them, and get both scores; LongBench's by a prompt of this
    package, or by LongBench's own (`prompts`: its config/dataset2prompt.json), and get the score of their data set.

    Args:
        max_length: tokens of prompt and answer; a longer prompt loses its middle, as in LongBench, and is counted.
        prompts: a JSON file, {dataset: prompt with {context} and {input}}.
    """

    max_length: int | None = None
    prompts: str | None = None
    name: str = "longqa"
    protocol: str = "longalpaca"
    max_new_tokens: int = 128
    fields = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._templates: dict[str, str] = {}
        if self.prompts:
            try:
                self._templates = json.loads(Path(self.prompts).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.prompts}: no JSON file of prompts ({error}).") from error

    @property
    def parameters(self) -> dict[str, Any]:
        """How prompts are made and cut."""
        return {"chat": self.chat, "max_length": self.max_length, "prompts": self._templates}

    def questions(self) -> Iterator[Question]:
        """One a record."""
        for number, (file, row) in enumerate(self.rows()):
            yield Question(
                f"{file}/{number:05d}", None, lambda _, r=row: self.make_prompt(r), (), self.kind(row) or stem(file)
            )

    def kind(self, row: dict[str, Any]) -> str | None:
        """LongBench's name of the data set, or None for a record of LongAlpaca's.

        Raises: ValueError: a record of neither format, or of a data set without a known score.
        """
        if "context" in row and "answers" in row:
            kind = row.get("dataset", "")
            if kind not in LONGBENCH:
                raise ValueError(f"{self.source}: dataset {kind!r} is not one of {', '.join(LONGBENCH)}.")
            return kind
        if "instruction" in row and "output" in row:
            return None
        raise ValueError(
            f"{self.source}: a record with the fields {sorted(row)} is neither LongAlpaca's (instruction, output) nor "
            f"LongBench's (context, input, answers, dataset)."
        )

    def make_prompt(self, row: dict[str, Any]) -> Prompt:
        """The prompt of one record."""
        kind = self.kind(row)
        if "instruction" in row:
            text = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
            return Prompt(text, [row["output"]])
        summary = LONGBENCH[kind][0] == "rougeL"
        template = self._templates.get(kind, SUMMARY_PROMPT if summary else PROMPT)
        return Prompt(template.replace("{context}", row["context"]).replace("{input}", row["input"]), row["answers"])

    def _measure(self, subject: Subject, key: str, question: Question) -> dict[str, Any]:
        limits = LONGBENCH.get(question.dataset)
        metrics, self.max_new_tokens = ((limits[0],), limits[1]) if limits else (("f1", "rougeL"), 128)
        prompt = question.make(subject)
        ids = self.prompt_ids(subject, prompt) if limits or self.chat else _as_trained(subject, prompt.text)
        room = (self.max_length or subject.window) - self.max_new_tokens
        excess = max(0, len(ids) - room)
        if excess:
            ids = ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
        answer = subject.answer(ids, self.max_new_tokens)
        scores = {"f1": token_f1, "rougeL": rouge_l}
        return {
            "key": key,
            "task": self.name,
            "dataset": question.dataset,
            "protocol": ("longbench" if limits else self.protocol) + (", chat template" if self.chat else ""),
            "variant": subject.variant,
            "length": None,
            "unit": question.unit or question.key,
            "beyond_window": len(ids) + self.max_new_tokens > subject.window,
            "tokens": len(ids),
            "cut_tokens": excess,
            "answers": prompt.answers,
            "answer": answer,
            "measures": [[m, None, scores[m](answer, prompt.answers), 1] for m in metrics],
        }


def _as_trained(subject: Subject, text: str) -> list[int]:
    """A LongAlpaca prompt as training sees it, less the answer."""
    row = tokenize_record({"instruction": text, "output": "answer"}, subject.tokenizer)
    return row["input_ids"][: row["labels"].count(-100)]

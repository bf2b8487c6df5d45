"""Long QA: LongAlpaca's records, and LongBench's with its scores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_longlora.data.records import IGNORED, tokenize_record
from peft_longlora.data.shapes import refuse_unread
from peft_longlora.eval.identity import content_digest, versions
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.metrics import check_rouge, rouge_l, token_f1
from peft_longlora.eval.tasks.prompts import Prompt, Question
from peft_longlora.eval.tasks.records import RecordTask, check_lists, check_texts

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

    LongAlpaca's records are asked as `data.tokenize_record` trains them, and get both scores. LongBench's are asked
    with a prompt of this package, or with LongBench's own (`prompts`: its config/dataset2prompt.json), and get the
    score of their data set.

    Args:
        max_length: tokens of prompt and answer; a longer prompt loses its middle, as in LongBench, and is counted.
        prompts: a JSON file, {dataset: prompt with {context} and {input}}.
        max_new_tokens: of an answer.
    """

    max_length: int | None = None
    prompts: str | None = None
    name: str = "longqa"
    protocol: str = "longalpaca"
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self._templates: dict[str, str] = {}
        if self.prompts:
            try:
                if not Path(self.prompts).is_file():
                    raise ValueError("no such file")
                self._templates = json.loads(Path(self.prompts).read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self.prompts}: not a JSON file of prompts ({error}). Use LongBench's dataset2prompt.json."
                ) from error
            is_dict = isinstance(self._templates, dict)
            if not is_dict or not all(isinstance(t, str) and "{context}" in t for t in self._templates.values()):
                raise ValueError(
                    f"{self.prompts}: not an object of prompts by data set, each with {{context}} in it. Give "
                    f"LongBench's config/dataset2prompt.json."
                )

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings for making and cutting prompts."""
        made = {**super().parameters, "max_length": self.max_length, "prompts": self._templates}
        return {**made, "rouge_score": versions("rouge-score").get("rouge_score")}

    def questions(self) -> Iterator[Question]:
        """One question for each record."""
        for number, (file, row) in enumerate(self.rows()):
            yield Question(
                f"{file}/{number:05d}", None, lambda _, r=row: self.make_prompt(r), (), self.kind(row) or file
            )

    def check_record(self, row: dict[str, Any]) -> None:
        """A record of one of the two formats; LongBench's of a data set with a known score, and prompt if given."""
        if "context" in row and "answers" in row:
            check_texts(row, "context")
            check_lists(row, "answers")
            kind = row.get("dataset")
            if kind not in LONGBENCH:
                raise ValueError(f"dataset {kind!r} is not one of {', '.join(LONGBENCH)}.")
            if not isinstance(row.get("input"), str):  # empty in gov_report, which asks nothing
                raise ValueError(f"no 'input', or it is not text: {str(row.get('input'))[:40]!r}.")
            if self.prompts and kind not in self._templates:
                raise ValueError(f"{self.prompts} has no prompt for {kind!r}.")
            if LONGBENCH[kind][0] == "rougeL":
                check_rouge(row["answers"])
        elif "instruction" in row and "output" in row:
            check_texts(row, "instruction", "output")
            refuse_unread("the record", row, {"instruction", "input", "output"}, [row["instruction"], row["output"]])
            check_rouge([row["output"]])
            if not isinstance(row.get("input") or "", str):
                raise ValueError(f"'input' is not text: {str(row['input'])[:40]!r}.")
        else:
            raise ValueError(
                f"a record with the fields {sorted(row)} is neither LongAlpaca's (instruction, output) nor LongBench's "
                f"(context, input, answers, dataset)."
            )

    @staticmethod
    def kind(row: dict[str, Any]) -> str | None:
        """LongBench's name of the data set, or None for a record of LongAlpaca's."""
        return row["dataset"] if "context" in row and "answers" in row else None

    def check(self, subject: Subject) -> None:
        """Check that every prompt has room beside its answer.

        Raises: ValueError.
        """
        window = self.max_length or subject.window
        for kind in dict.fromkeys(self.kind(row) for _, row in self.rows()):
            tokens = LONGBENCH[kind][1] if kind else self.max_new_tokens
            if window <= tokens:
                raise ValueError(
                    f"{self.name}: answers of {kind or 'LongAlpaca'} take {tokens} tokens, which leaves no room for a "
                    f"prompt in {window}. Use a larger max_length=..."
                )

    def make_prompt(self, row: dict[str, Any]) -> Prompt:
        """The prompt of one record."""
        kind = self.kind(row)
        if kind is None:
            text = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
            return Prompt(text, [row["output"]])
        own = SUMMARY_PROMPT if LONGBENCH[kind][0] == "rougeL" else PROMPT
        template = self._templates.get(kind, own)
        # In one step, because a context may contain "{input}".
        text = re.sub(r"\{(context|input)\}", lambda found: row[found[1]], template)
        return Prompt(text, row["answers"])

    def _measure(self, subject: Subject, key: str, question: Question) -> dict[str, Any]:
        limits = LONGBENCH.get(question.dataset)
        metrics, max_new_tokens = ((limits[0],), limits[1]) if limits else (("f1", "rougeL"), self.max_new_tokens)
        protocol = self.protocol
        if limits:
            protocol = "longbench" if self._templates else "longbench's scores, own prompts"
        prompt = question.make(subject)
        ids = self.prompt_ids(subject, prompt) if limits or self.chat else _as_trained(subject, prompt.text)
        room = (self.max_length or subject.window) - max_new_tokens
        excess = max(0, len(ids) - room)
        if excess:
            ids = ids[: room // 2] + ids[len(ids) - (room - room // 2) :]
        answer = subject.answer(ids, max_new_tokens)
        scores = {"f1": token_f1, "rougeL": rouge_l}
        return {
            "key": key,
            "task": self.name,
            "dataset": question.dataset,
            "protocol": protocol + (", chat template" if self.chat else ""),
            "variant": subject.variant,
            "length": None,
            "unit": question.unit or question.key,
            "content": content_digest(prompt.text, *([room] if excess else [])),
            "beyond_window": len(ids) + max_new_tokens > subject.window,
            "tokens": len(ids),
            "cut_tokens": excess,
            "answers": prompt.answers,
            "answer": answer,
            "measures": [[m, None, scores[m](answer, prompt.answers), 1] for m in metrics],
        }


def _as_trained(subject: Subject, text: str) -> list[int]:
    """A LongAlpaca prompt as in training, without the answer."""
    row = tokenize_record({"instruction": text, "output": "answer"}, subject.tokenizer)
    return row["input_ids"][: row["labels"].count(IGNORED)]

"""Multi-document question answering, with the gold passage at chosen places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from peft_longlora.eval.tasks.metrics import contains_any
from peft_longlora.eval.tasks.prompts import Prompt, Question
from peft_longlora.eval.tasks.records import RecordTask, check_lists, check_texts


@dataclass
class MultiDoc(RecordTask):
    """Multi-document QA with the gold passage at chosen places (arXiv:2307.03172), in that paper's record format.

    Args:
        places: places of the gold passage, as the part of the documents before it, 0 to 1.
        max_new_tokens: of an answer.
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
            raise ValueError(f"no 'ctxs', or it is not a list of passages with title and text: {str(passages)[:60]!r}.")
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
                unit = f"{file}/{number:05d}"  # the same question at five places is one unit, not five
                yield Question(key, None, lambda _, p=prompt: p, (group,), file, unit)

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
        """1 if the first line contains one of the answers, otherwise 0."""
        return {"accuracy": contains_any(answer, prompt.answers)}

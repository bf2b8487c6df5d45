"""Topic retrieval, on LongChat's records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft_longlora.eval.tasks.metrics import contains
from peft_longlora.eval.tasks.prompts import Prompt, Question
from peft_longlora.eval.tasks.records import RecordTask, check_lists, check_texts


@dataclass
class Topics(RecordTask):
    """Topic retrieval on LongChat's records: name the first topic of a long talk, the first entry of "topics".

    An answer is correct if it contains the topic, both normalised. (In LongChat a larger model judges.)

    Args:
        max_new_tokens: of an answer.
    """

    name: str = "topics"
    protocol: str = "longchat"
    max_new_tokens: int = 50

    def check_record(self, row: dict[str, Any]) -> None:
        """A prompt, and its topics."""
        check_texts(row, "prompt")
        check_lists(row, "topics")

    def questions(self) -> Iterator[Question]:
        """One question for each record."""
        for number, (file, row) in enumerate(self.rows()):
            prompt = Prompt(row["prompt"], [row["topics"][0]])
            group = f"{len(row['topics'])} topics"
            yield Question(f"{file}/{number:05d}", None, lambda _, p=prompt: p, (group,), file)

    def score(self, answer: str, prompt: Prompt) -> dict[str, float]:
        """1 if the answer contains the topic, otherwise 0."""
        return {"accuracy": float(contains(answer, prompt.answers[0]))}

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
            yield Question(f"{file}/{number:05d}", None, lambda _, p=prompt: p, (group,), file)

    def score(self, answer: str, prompt: Prompt) -> dict[str, float]:
        """1 where the answer contains the topic."""
        return {"accuracy": float(contains(answer, prompt.answers[0]))}

"""Passkey retrieval: a number hidden at a depth of a long text, in the original's filler or in books."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.haystack import NOISE, Excerpt, insert_at, split_sentences
from peft_longlora.eval.tasks.prompts import GeneratedTask, Prompt, Question

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key?"
PREFIX = " The pass key is"


@dataclass
class Passkey(GeneratedTask):
    """The task "passkey" (the original's prompt) or, with books, "needle" (the same needle in real text).

    One prompt for each length, depth and seed. The prompt is that of LongLoRA's passkey_retrivial.py, in which the
    depth is random and the length is a number of characters; here both are chosen. The score is exact match of the
    first number in the greedy answer. Token ids are not compared, because tokenizers cut numbers differently.

    Args:
        depths: parts of the text before the needle, 0 to 1.
        seeds: the number of keys for each length and depth.
        max_new_tokens: of an answer.
        lengths: tokens of prompt and answer together.
        seed: the seed of the prompts.
        books: real text as filler; without it the original's filler is used.
    """

    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    seeds: int = 2
    max_new_tokens: int = 12

    def __post_init__(self) -> None:
        self.name, self.protocol = ("needle", "passkey in books") if self.books else ("passkey", "longlora")
        if bad := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise ValueError(f"depth {bad[0] * 100:g}% is outside 0 to 100.")

    def questions(self) -> Iterator[Question]:
        """By length, depth and seed."""
        for length in self.lengths:
            for depth in self.depths:
                for seed in range(self.seeds):

                    def make(subject: Subject, length: int = length, depth: float = depth, seed: int = seed) -> Prompt:
                        return self.make_prompt(subject, length, depth, seed)

                    key = f"{length}/{depth:.4f}/{seed}"
                    yield Question(key, length, make, (f"depth {100 * depth:g}%",), self.dataset)

    def make_prompt(self, subject: Subject, length: int, depth: float, seed: int) -> Prompt:
        """The prompt that fills `length` together with the answer."""
        books = self.books and self.books.up_to(length)
        rng = random.Random(f"{self.seed} passkey {length} {depth:.4f} {seed}")
        key = str(rng.randint(1, 49999) if self.books is None else rng.randint(10000, 99999))
        offset = rng.random()

        def build(n: int) -> Prompt:
            return Prompt("\n".join(_lines(books, n, depth, key, offset)), [key], PREFIX)

        return self.fill(subject, length, build)

    def score(self, answer: str, prompt: Prompt) -> dict[str, float]:
        """1 if the first number of the answer is the key, otherwise 0."""
        number = re.search(r"\d+", answer)
        return {"accuracy": float(number is not None and number.group() == prompt.answers[0])}


def _lines(books: Excerpt | None, n: int, depth: float, key: str, offset: float) -> list[str]:
    needle = NEEDLE.format(key=key)
    if books is None:
        filler = " ".join([NOISE] * (n // len(NOISE) + 1))
        prefix = int(n * depth)
        # As in the original, both parts of the filler start from its first sentence.
        return [TASK, filler[:prefix], needle, filler[: n - prefix], QUESTION]
    return [TASK, insert_at(split_sentences(books.text(n, offset)), [needle], [depth]), QUESTION]

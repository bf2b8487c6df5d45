"""Prompts that fill a length, and tasks made of prompts with known answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peft_longlora.eval.identity import content_digest
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.haystack import Books
from peft_longlora.eval.tasks.task import Item, Task
from peft_longlora.hub.loading import load_part


@dataclass(frozen=True)
class Prompt:
    """A question to a model.

    Attributes:
        text: the text that the model reads.
        answers: the texts to look for in its answer.
        prefix: the start of its answer, written after the text (in a chat: as the start of the assistant's turn).
    """

    text: str
    answers: list[str]
    prefix: str = ""


@dataclass(frozen=True)
class Question:
    """A prompt that is not made yet, so that each process makes only its own prompts.

    Attributes:
        key: its name in the run.
        length: tokens that prompt and answer may have, or None.
        make: makes the prompt; it is called with the subject.
        groups: the rows in which it counts besides the main row, such as "depth 50%".
        dataset: the name of its data.
        unit: a name that it shares with questions that are not independent of it; None: it is independent.
    """

    key: str
    length: int | None
    make: Callable[[Subject], Prompt]
    groups: tuple[str, ...] = ()
    dataset: str = "generated"
    unit: str | None = None


@dataclass
class PromptTask:
    """The base of tasks with prompts: ask, score, record. Subclasses give `questions` and `score`.

    Args:
        chat: put the text into the tokenizer's chat template, as the user's turn.
    """

    chat: bool = False
    notes: list[str] = field(default_factory=list)
    name: str = ""
    protocol: str = ""
    max_new_tokens: int = 32

    def questions(self) -> Iterator[Question]:
        """All questions, in a fixed order."""
        raise NotImplementedError

    def score(self, answer: str, prompt: Prompt) -> dict[str, float]:
        """Scores in [0, 1] by metric."""
        raise NotImplementedError

    def check(self, subject: Subject) -> None:
        """Make one prompt of each length, so that a length that is too short is refused before hours of work.

        Raises: ValueError.
        """
        for question in {question.length: question for question in self.questions()}.values():
            question.make(subject)

    def prompt_ids(self, subject: Subject, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, in the chat template if `chat` is set."""
        return encode_prompt(subject, prompt, self.chat)

    def items(self, subject: Subject) -> Iterator[Item]:
        """One item a question."""
        totals = Counter(question.length for question in self.questions())
        asked: Counter[int | None] = Counter()
        for question in self.questions():
            asked[question.length] += 1
            key = f"{self.name}/{subject.variant}/{question.key}"
            label = f"{self.name} {question.length or ''}".strip()

            def measure(key: str = key, question: Question = question) -> dict[str, Any]:
                return self._measure(subject, key, question)

            yield Item(key, label, asked[question.length] / totals[question.length], measure)

    def _measure(self, subject: Subject, key: str, question: Question) -> dict[str, Any]:
        prompt = question.make(subject)
        ids = self.prompt_ids(subject, prompt)
        answer = subject.answer(ids, self.max_new_tokens)
        scores = self.score(answer, prompt)
        return {
            "key": key,
            "task": self.name,
            "dataset": question.dataset,
            "protocol": self.protocol + (", chat template" if self.chat else ""),
            "variant": subject.variant,
            "length": question.length,
            "unit": question.unit or question.key,
            "content": content_digest(prompt.text, prompt.prefix),
            "beyond_window": len(ids) + self.max_new_tokens > subject.window,
            "tokens": len(ids),
            "answers": prompt.answers,
            "answer": answer,
            "measures": [[m, g, float(s), 1] for g in (None, *question.groups) for m, s in scores.items()],
        }


@dataclass
class GeneratedTask(PromptTask):
    """The base of tasks that make their prompts at chosen lengths.

    Args:
        lengths: tokens of prompt and answer together.
        seed: the seed of the prompts.
        books: real text as filler, or None.
    """

    lengths: list[int] = field(default_factory=list)
    seed: int = 0
    books: Books | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """Without lengths, depths and numbers: they are in the samples' names, so a later run may add more."""
        return {"chat": self.chat, "seed": self.seed, "max_new_tokens": self.max_new_tokens}

    def data(self) -> dict[str, Any] | None:
        """The books, if any."""
        return self.books.corpus.summary().entry() if self.books else None

    @property
    def dataset(self) -> str:
        """Name of the books, or "generated"."""
        return self.books.name if self.books else "generated"

    def check_shortest(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make a prompt of the shortest length, for which the tokenizer is enough, before a model is loaded.

        Raises: ValueError: the prompt does not fit, or cannot be made.
        """
        first = min(self.questions(), key=lambda question: question.length or 0, default=None)
        if first is not None:
            first.make(_Encoder(tokenizer))

    def fill(self, subject: Subject, length: int, build: Callable[[int], Prompt]) -> Prompt:
        """The prompt with as many units of filler as fit into a length less the answer.

        Raises: ValueError: the prompt does not fit without filler, or its text does not fit into memory.
        """
        try:
            budget, place = length - self.max_new_tokens, f"{self.name} at {length} tokens: "
            n = fit_filler(lambda n: len(self.prompt_ids(subject, build(n))), budget, place)
            return build(n)
        except (MemoryError, OverflowError) as error:  # the text of this length, before the model reads it
            raise ValueError(
                f"The text of a prompt of {length} tokens does not fit into this machine's memory. Use shorter "
                f"lengths=..."
            ) from error


@dataclass(frozen=True)
class _Encoder:
    """What a generated prompt reads of a subject: its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    encode = Subject.encode


def check_shortest(tasks: Iterable[Task], tokenizer: str) -> None:
    """Refuse lengths that are too short for a generated prompt, before a model is loaded.

    Args:
        tokenizer: a folder or an id on the Hub. If it cannot be loaded, nothing is checked: `load_subject` says why.

    Raises: ValueError.
    """
    plain = (getattr(task, "task", task) for task in tasks)
    if not (generated := [task for task in plain if isinstance(task, GeneratedTask)]):
        return
    try:
        words = load_part(AutoTokenizer, tokenizer, "tokenizer")
    except (ValueError, OSError, ImportError):
        return
    for task in generated:
        task.check_shortest(words)


def encode_prompt(subject: Subject, prompt: Prompt, chat: bool) -> list[int]:
    """Token ids of text and prefix; in a chat the prefix begins the assistant's turn.

    Raises: ValueError: `chat` is set, but the tokenizer has no template.
    """
    if not chat:
        return subject.encode(prompt.text + prompt.prefix)
    if subject.tokenizer.chat_template is None:
        raise ValueError("chat=True: the tokenizer has no chat template. Leave it out, or give another tokenizer=...")
    turns = [{"role": "user", "content": prompt.text}]
    text = subject.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return subject.tokenizer(text + prompt.prefix.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]


def fit_filler(count_tokens: Callable[[int], int], budget: int, place: str = "") -> int:
    """The largest amount of filler, to within half a percent of the tokens, with which a prompt fits the budget.

    It remembers nothing between prompts, because a prompt must not depend on the prompts that its process made before.

    Args:
        count_tokens: tokens of a prompt with n units of filler; grows with n.
        budget: tokens.
        place: task and length, for the message of an error.

    Raises:
        ValueError: the prompt does not fit without any filler.
    """
    low, low_tokens = 0, count_tokens(0)
    if low_tokens > budget:
        raise ValueError(
            f"{place}The prompt alone has {low_tokens} tokens, but the length leaves room for {budget} beside the "
            f"answer. Use longer lengths=..."
        )
    empty, slack = low_tokens, max(4, budget // 200)
    high: int | None = None
    n = 64
    while budget - low_tokens > slack and (high is None or high - low > 1):
        tokens = count_tokens(n)
        if tokens <= budget:
            low, low_tokens = n, tokens
        else:
            high = n
        # Estimate from the tokens of a unit so far, within the known bounds.
        n = max(low + 1, int(n * (budget - slack // 2 - empty) / max(tokens - empty, 1)))
        if high is not None and n >= high:
            n = (low + high) // 2
    return low

"""Tasks by RULER's definitions (arXiv:2404.06654), generated here: needles, variable tracking, common, frequent words.

Settings, prompts, answer prefixes and answer lengths are those of NVIDIA/RULER's synthetic.yaml and constants.py; the
essays are the given books, and the words are this package's own, so scores are close to RULER's but not the same.
RULER's two question answering tasks, which need SQuAD and HotpotQA, are left out.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.haystack import NOISE, Excerpt, insert_at, split_sentences
from peft_longlora.eval.tasks.metrics import contains_all
from peft_longlora.eval.tasks.prompts import GeneratedTask, Prompt, Question
from peft_longlora.eval.tasks.words import draw_words

NEEDLE = "One of the special magic {kind} for {key} is: {value}."


@dataclass(frozen=True)
class Needles:
    """RULER's settings of one needle task: the filler, and the numbers of keys, values for each key, and queries."""

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value_kind="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}
TASKS = (*NEEDLES, "vt", "cwe", "fwe")
ANSWER_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50}
HOPS = 4
NO_BOOKS = {"niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "fwe"}


@dataclass
class Ruler(GeneratedTask):
    """One RULER task, named "ruler_" plus RULER's name. The score is the share of the answers that is found.

    Args:
        kind: one of TASKS.
        samples: prompts for each length.
        lengths: tokens of prompt and answer together.
        seed: the seed of the prompts.
        books: real text. Tasks with essays need it; "cwe" takes words from it.

    Raises:
        ValueError: an unknown task, or a task that needs books has none.
    """

    kind: str = "niah_single_1"
    samples: int = 20
    protocol: str = "ruler"

    def __post_init__(self) -> None:
        if self.kind not in TASKS:
            raise ValueError(f"RULER task {self.kind!r} is unknown. Use one of {', '.join(TASKS)}.")
        if self.kind in NO_BOOKS:
            self.books = None
        elif self.books is None:
            raise ValueError(f"ruler_{self.kind} hides its needles in real text. Give books=...")
        self.name = f"ruler_{self.kind}"
        self.max_new_tokens = ANSWER_TOKENS.get(self.kind, 128)

    def questions(self) -> Iterator[Question]:
        """By length and number."""
        for length in self.lengths:
            for number in range(self.samples):

                def make(subject: Subject, length: int = length, number: int = number) -> Prompt:
                    return self.make_prompt(subject, length, number)

                yield Question(f"{length}/{number:04d}", length, make, dataset=self.dataset)

    def make_prompt(self, subject: Subject, length: int, number: int) -> Prompt:
        """The prompt that fills `length` together with the answer. It starts from one random state each time."""
        seed = f"{self.seed} {self.name} {length} {number}"
        books = self.books and self.books.up_to(length)
        make: Callable[[random.Random, int], Prompt]
        if self.kind in NEEDLES:
            make = partial(make_needles, NEEDLES[self.kind], books)
        elif self.kind == "vt":
            make = partial(make_chains, length < 4096)
        elif self.kind == "cwe":
            make = partial(make_words, books, length < 4096)
        else:
            make = partial(make_code, length // 50)

        def build(n: int) -> Prompt:
            return make(random.Random(seed), n)

        return self.fill(subject, length, build)

    def score(self, answer: str, prompt: Prompt) -> dict[str, float]:
        """The share of the answers that the model's text contains."""
        return {"recall": contains_all(answer, prompt.answers)}


def make_needles(task: Needles, books: Excerpt | None, rng: random.Random, n: int) -> Prompt:
    """Needles in n lines of noise, n words of books, or n other needles."""
    keys = _draw(rng, task.key_kind, task.keys)
    values = [_draw(rng, task.value_kind, task.values) for _ in keys]
    needles = [
        NEEDLE.format(kind=task.value_kind, key=key, value=value)
        for key, own in zip(keys, values, strict=True)
        for value in own
    ]
    rng.shuffle(needles)
    asked = rng.sample(range(len(keys)), task.queries)
    offset, depths = rng.random(), [d / 39 for d in rng.sample(range(40), len(needles))]
    if task.haystack == "essay":
        context = insert_at(split_sentences(books.text(n, offset)), needles, depths)
    else:
        lines = [NOISE] * n
        if task.haystack == "needle":
            others = zip(_draw(rng, task.key_kind, n, keys), _draw(rng, task.value_kind, n), strict=True)
            lines = [NEEDLE.format(kind=task.value_kind, key=key, value=value) for key, value in others]
        for needle in needles:
            lines.insert(rng.randint(0, len(lines)), needle)
        context = "\n".join(lines)
    names = [keys[i] for i in asked]
    query = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
    answers = [value for i in asked for value in values[i]]
    kind, some, are_all, are = task.value_kind, "Some", "are all", "are"
    if len(answers) == 1:
        kind, some, are_all, are = task.value_kind[:-1], "A", "is", "is"
    text = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz "
        f"you about the {kind} afterwards.\n{context}\n"
        f"What {are_all} the special magic {kind} for {query} mentioned in the provided text?"
    )
    return Prompt(text, answers, f" The special magic {kind} for {query} mentioned in the provided text {are}")


def _draw(rng: random.Random, kind: str, n: int, taken: list[str] | None = None) -> list[str]:
    """n different keys or values of one kind, none of which is taken."""
    found: dict[str, None] = {}
    while len(found) < n:
        if kind == "numbers":
            new = [str(rng.randint(10**6, 10**7 - 1))]
        elif kind == "uuids":
            new = [str(uuid.UUID(int=rng.getrandbits(128), version=4))]
        elif n <= 1000:
            new = draw_words(rng, n)
        else:  # there are not enough pairs of words
            new = [f"{word}-{rng.randint(0, 99)}" for word in draw_words(rng, 1000)]
        found |= dict.fromkeys(word for word in new if word not in (taken or ()))
    return list(found)[:n]


def make_chains(is_short: bool, rng: random.Random, n: int) -> Prompt:
    """A chain of assignments in n lines of noise, after an example of the same: 500 tokens, fewer in short prompts."""
    example, example_names = _chain(rng, 5 if is_short else 15, name_length=3)
    prompt, names = _chain(rng, n, name_length=5)
    text = f"{example.text}{example.prefix} {' '.join(example_names)}\n\n{prompt.text}"
    return Prompt(text, names, prompt.prefix)


def _chain(rng: random.Random, n: int, name_length: int) -> tuple[Prompt, list[str]]:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=name_length))] = None
    value, chain = str(rng.randint(10000, 99999)), list(names)
    lines = [f"VAR {chain[0]} = {value}"]
    lines += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(chain)]
    # A line of noise between any two, if there are enough lines.
    places = sorted(rng.sample(range(n), len(lines)) if n > len(lines) else rng.choices(range(n + 1), k=len(lines)))
    sentences = [f"{NOISE}\n"] * n
    for shift, (place, line) in enumerate(zip(places, lines, strict=True)):
        sentences.insert(place + shift, line)
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + " ".join(sentences)  # as there: an assignment begins a line, and noise follows it
        + f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    prefix = (
        f" Answer: According to the chain(s) of variable assignment in the text above, {HOPS + 1} variables are "
        f"assgined the value {value}, they are: "  # RULER's spelling
    )
    return Prompt(text, chain, prefix), chain


def make_words(books: Excerpt, is_short: bool, rng: random.Random, n: int) -> Prompt:
    """Ten frequent words among n rare words, after a short example of the same.

    Raises: ValueError: the books have too few words, even if words are joined in pairs.
    """
    vocabulary = sorted({word for word in books.words if re.fullmatch("[a-z]{4,12}", word)})
    size, lacking = len(vocabulary), n + 60 - len(vocabulary)
    if lacking > size**2:
        raise ValueError(
            f"ruler_cwe asks about {n + 60} different words or more, and {books.name} holds {size} of 4 to 12 letters. "
            f"Give more text as books=..."
        )
    if lacking > 0:
        vocabulary += [vocabulary[p // size] + vocabulary[p % size] for p in rng.sample(range(size**2), lacking)]
    words = rng.sample(vocabulary, n + 60)
    shape, small = ((6, 1), (3, 1)) if is_short else ((30, 3), (10, 3))
    example = _word_list(rng, words[:10], words[10 : 20 if is_short else 40], *small)
    prompt = _word_list(rng, words[40:50], words[50 : 50 + n], *shape)
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(example.answers, 1))
    return Prompt(f"{example.text}{example.prefix} {listed}\n{prompt.text}", prompt.answers, prompt.prefix)


def _word_list(rng: random.Random, common: list[str], others: list[str], often: int, seldom: int) -> Prompt:
    words = common * often + others * seldom
    rng.shuffle(words)
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
        + " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
        + "\nQuestion: What are the 10 most common words in the above list?"
    )
    return Prompt(text, common, " Answer: The top 10 words that appear most often in the list are:")


def make_code(vocabulary: int, rng: random.Random, n: int) -> Prompt:
    """About n coded words. The k-th most frequent occurs n / (zeta(2) k^2) times; the most frequent is dots."""
    words: dict[str, None] = {"...": None}
    while len(words) < max(vocabulary, 4):
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked, zeta = list(words), math.pi**2 / 6
    said = [word for k, word in enumerate(ranked, 1) for _ in range(int(n / (zeta * k**2)))]
    rng.shuffle(said)
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(said)}\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?"
    )
    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return Prompt(text, ranked[1:4], prefix)

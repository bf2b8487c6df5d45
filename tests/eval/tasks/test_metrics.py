"""Scores of answers: hand-computed cases, and the benchmarks' formulas followed step by step."""

import random
import string

import pytest

from peft_longlora.eval.tasks.longqa import LongQA
from peft_longlora.eval.tasks.metrics import contains_all, contains_any, normalize_answer, rouge_l, token_f1
from peft_longlora.eval.tasks.multidoc import MultiDoc
from peft_longlora.eval.tasks.prompts import Prompt
from peft_longlora.eval.tasks.topics import Topics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's  pyjamas!", "cats pyjamas"),
        ("An apple, a day; the end.", "apple day end"),
        ("Theatre analysis", "theatre analysis"),
        ("the-a", "thea"),
        ("naïve — café", "naïve — café"),
        ("  \n\tTHE  ", ""),
    ],
)
def test_normalisation_by_hand(text, expected):
    assert normalize_answer(text) == expected


def longbench_f1(answer: str, reference: str) -> float:
    """LongBench's qa_f1_score, step by step and without its tools: lower, punctuation, articles, spaces; F1."""
    words = []
    for text in (answer, reference):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        words.append([w for w in text.split() if w not in ("a", "an", "the")])
    left = list(words[1])
    same = 0
    for word in words[0]:
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0
    precision, recall = same / len(words[0]), same / len(words[1])
    return 2 * precision * recall / (precision + recall)


def test_f1_is_longbenchs():
    rng = random.Random(0)
    vocabulary = ["the", "a", "an", "cat", "Cat,", "dog.", "ran", "(far)", "an", "away!", "7", "x-ray"]
    for _ in range(300):
        answer, *references = (" ".join(rng.choices(vocabulary, k=rng.randint(0, 8))) for _ in range(3))
        assert token_f1(answer, references) == pytest.approx(max(longbench_f1(answer, r) for r in references))


def test_f1_by_hand():
    # "blue whale" in "it is blue whale": 2 common, precision 2/4, recall 2/2
    assert token_f1("It is a blue whale.", ["the blue whale"]) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert token_f1("", ["x"]) == token_f1("y", ["x"]) == 0
    assert token_f1("y", ["x", "Y!"]) == 1


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(100):
        answer, reference = ([rng.choice(["red", "green", "blue", "low", "high"]) for _ in range(9)] for _ in range(2))
        n = longest_common_subsequence(answer, reference)
        expected = 2 * n / (len(answer) + len(reference))
        assert rouge_l(" ".join(answer), [" ".join(reference)]) == pytest.approx(expected)
    assert rouge_l("a b", ["x", "a b"]) == 1


def test_contains():
    assert contains_any("The Beatles, of course", ["beatles"]) == 1
    assert contains_any("first line\nThe Beatles", ["Beatles"]) == 0, "what follows the first line does not count"
    assert contains_any("It was Asuka.", ["Rousey", "asuka"]) == 1
    assert contains_all("7, 12 and ABC", ["12", "abc", "99", "7"]) == 0.75


@pytest.mark.parametrize("reference", ["The A", "?!", "a", "...", "An the"])
def test_a_reference_that_normalises_to_nothing_is_not_in_every_answer(reference):
    """It is right where the answer is it, and nowhere else; the empty text is within any."""
    topics, multidoc = Topics(), MultiDoc()
    for answer in ("It is a whale, isn't it?!", "the", "...", "", "An answer of the kind", " \n", "!"):
        is_it = answer.strip(" \n").lower() == reference.lower()
        for score in (topics.score, multidoc.score):
            assert score(answer, Prompt("", [reference]))["accuracy"] == is_it, (answer, score)
        assert contains_any(answer, [reference, "whale"]) == float(is_it or "whale" in answer)
        assert token_f1(answer, [reference]) == 0 == longbench_f1(answer, reference), "as LongBench has it"
    assert contains_any(f" {reference}\nbecause", [reference]) == 1
    assert contains_any(f'"{reference.upper()}."', [reference]) == float(any(sign.isalpha() for sign in reference))


def test_a_reference_of_a_script_that_rouge_does_not_read_is_refused(tmp_path):
    """rouge-score knows a to z and digits, and gives 0 to the very same text."""
    assert rouge_l("东京", ["东京"]) == 0
    (tmp_path / "qa.jsonl").write_text('{"instruction": "Which city?", "output": "东京"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"qa.jsonl:1: ROUGE-L reads only words of a to z and digits, and '东京'"):
        LongQA(source=str(tmp_path / "qa.jsonl")).data()

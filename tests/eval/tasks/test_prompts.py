"""Prompts: they fill their length, the answers are in them, a perfect reader scores 100% and a silent one 0%."""

import gzip
import json
import math
import random
import re
from collections import Counter

import pytest

from peft_longlora.eval.corpus import Corpus
from peft_longlora.eval.report.cells import collect_cells
from peft_longlora.eval.tasks.haystack import Books, insert_at, split_sentences
from peft_longlora.eval.tasks.longqa import LongQA
from peft_longlora.eval.tasks.multidoc import MultiDoc
from peft_longlora.eval.tasks.passkey import Passkey
from peft_longlora.eval.tasks.prompts import fit_filler
from peft_longlora.eval.tasks.ruler import NEEDLES, TASKS, Ruler
from peft_longlora.eval.tasks.topics import Topics
from tests.helpers.answering_models import (
    count_code,
    count_words,
    read_chain,
    read_needles,
    read_passkey,
    scripted_subject,
)

READERS = {**dict.fromkeys(NEEDLES, read_needles), "vt": read_chain, "cwe": count_words, "fwe": count_code}


@pytest.fixture(scope="session")
def books(tmp_path_factory) -> Books:
    """Sentences of made-up words: many different ones, as the word list of "cwe" needs."""
    folder, rng = tmp_path_factory.mktemp("books"), random.Random(0)
    words = ["".join(rng.choices("bcdfglmnprst", k=2) + rng.choices("aeiou", k=2) + ["s"]) for _ in range(4000)]
    text = " ".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(4000))
    (folder / "book.txt").write_text(text)
    return Books(Corpus(folder), 20_000)


def measure(task, subject):
    return [item.measure() for item in task.items(subject)]


def scores(records) -> dict:
    return {(c.name[3], c.name[5]): c.sums()[1].value() for c in collect_cells(records).values()}


def silent(prompt: str) -> str:
    return " nothing at all"


@pytest.mark.parametrize("in_books", [False, True])
def test_passkey(books, in_books):
    task = Passkey(lengths=[1000, 4000], depths=[0, 0.3, 1], seeds=2, books=books if in_books else None)
    records = measure(task, scripted_subject(read_passkey))
    assert len(records) == 12 and set(scores(records).values()) == {1.0}
    assert len({record["answers"][0] for record in records}) > 8, "keys differ"
    assert set(scores(measure(task, scripted_subject(silent))).values()) == {0.0}
    for record in records:
        assert 0.98 * record["length"] <= record["tokens"] + task.max_new_tokens <= record["length"]


def test_the_passkey_prompt_is_the_originals():
    """passkey_retrivial.py: task, filler, key, filler from its beginning again, question."""
    subject = scripted_subject(read_passkey)
    [record] = measure(Passkey(lengths=[2000], depths=[0.25], seeds=1), subject)
    key = record["answers"][0]
    task, before, information, after, question = subject.model.prompts[0].split("\n")
    garbage = " ".join(
        ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * 99
    )
    assert task == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there."
    )
    assert information == f"The pass key is {key}. Remember it. {key} is the pass key."
    assert question == "What is the pass key? The pass key is"
    assert garbage.startswith(before) and garbage.startswith(after)
    assert len(before) == int(0.25 * (len(before) + len(after)))


@pytest.mark.parametrize(
    ("answer", "score"), [(" 123. ", 1), ("123", 1), (" 1234", 0), (" 12 3", 0), ("321, no, 123", 0), ("", 0)]
)
def test_exact_match_takes_the_first_number(answer, score):
    from peft_longlora.eval.tasks.prompts import Prompt

    assert Passkey().score(answer, Prompt("", ["123"]))["accuracy"] == score


def test_depth_is_where_the_needle_is(books):
    for depth in (0.0, 0.5, 1.0):
        subject = scripted_subject(read_passkey)
        measure(Passkey(lengths=[4000], depths=[depth], seeds=1, books=books), subject)
        prompt = subject.model.prompts[0]
        place = prompt.index("The pass key is") / prompt.rindex("\nWhat is the pass key")
        assert place == pytest.approx(depth, abs=0.06)


def test_insertion():
    sentences = split_sentences("One. Two! Three? Four.")
    assert sentences == ["One.", "Two!", "Three?", "Four."]
    assert insert_at(sentences, ["B", "A"], [0.5, 0.0]) == "A One. Two! B Three? Four."
    assert insert_at([], ["A"], [1.0]) == "A"


@pytest.mark.parametrize("kind", TASKS)
def test_ruler(books, kind):
    """The reader knows nothing but the prompt, so the expected answers are right, complete and unambiguous."""
    length = 16_000 if kind == "cwe" else 5000
    task = Ruler(kind=kind, lengths=[length], samples=3, books=books)
    subject = scripted_subject(READERS[kind])
    records = measure(task, subject)
    assert scores(records) == {("recall", None): 1.0}
    assert scores(measure(task, scripted_subject(silent))) == {("recall", None): 0.0}
    for record, prompt in zip(records, subject.model.prompts, strict=True):
        assert 0.94 * length <= record["tokens"] + task.max_new_tokens <= length
        settings = NEEDLES.get(kind)
        if settings:
            found = len(re.findall("One of the special magic", prompt))
            assert found == settings.keys * settings.values if settings.haystack != "needle" else found > 20
            assert len(record["answers"]) == settings.queries * settings.values
    assert len({prompt[-300:] for prompt in subject.model.prompts}) == 3, "samples differ"


def test_rulers_settings():
    """synthetic.yaml and constants.py of NVIDIA/RULER."""
    assert (
        NEEDLES["niah_multikey_1"].keys == NEEDLES["niah_multivalue"].values == NEEDLES["niah_multiquery"].queries == 4
    )
    assert [Ruler(kind=kind, books=object()).max_new_tokens for kind in ("niah_single_1", "vt", "cwe", "fwe")] == [
        128,
        30,
        120,
        50,
    ]


def test_frequent_words_follow_zipfs_law():
    """Counts from the paper's formula with alpha 2, whose sum over all ranks is pi^2 / 6."""
    subject = scripted_subject(count_code)
    [record] = measure(Ruler(kind="fwe", lengths=[8000], samples=1), subject)
    said = Counter(subject.model.prompts[0].split("coded words. ")[1].split("\nQuestion")[0].split()).most_common()
    assert said[0][0] == "..." and [word for word, _ in said[1:4]] == record["answers"]
    n = said[0][1] * math.pi**2 / 6
    for k, (word, count) in enumerate(said, 1):
        assert abs(count - n / (math.pi**2 / 6 * k**2)) < 2 and (word == "..." or re.fullmatch("[a-z]{6}", word))
    assert len(said) <= 8000 // 50


@pytest.mark.parametrize(("length", "lines"), [(4096, 15), (3000, 5)])
def test_variable_tracking_has_an_example_first(length, lines):
    subject = scripted_subject(read_chain)
    [record] = measure(Ruler(kind="vt", lengths=[length], samples=1), subject)
    example, prompt = subject.model.prompts[0].split("\n\nMemorize and track")
    assert example.count("The grass is green.") == lines and example.count("VAR ") == prompt.count("VAR ") == 9
    assert not set(record["answers"]) & set(example.split()), "the example's variables are others"
    # variable_tracking.py and constants.py of NVIDIA/RULER, with their line ends and spelling
    body = prompt.partition("\n\n")[2].split("\n")
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    value = re.search(r"VAR \w+ = (\d+)", prompt).group(1)
    steps = zip(record["answers"], [value, *(f"VAR {name} " for name in record["answers"])], strict=False)
    chain = [f"VAR {name} = {before}" for name, before in steps]
    assert [line.removesuffix(noise).strip(" ") for line in body[:-1] if "VAR" in line] == [c.strip() for c in chain]
    assert all(line.removeprefix(" ") in (noise, *(f"{c} {noise}" for c in chain)) for line in body[:-2])
    assert body[-1] == (
        f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        f"chain(s) of variable assignment in the text above, 5 variables are assgined the value {value}, they are: "
    )


def test_common_words_need_words_enough(tmp_path):
    """A vocabulary that is too small for a length is put together in pairs, and refused where that is not enough."""
    letters = "bcdfghjklm"
    for count, text in (
        (9, " ".join("a" * 3 + x for x in letters[:9])),
        (90, " ".join(a + b + "us" for a in letters for b in letters[1:])),
    ):
        (tmp_path / f"{count}.txt").write_text(text)
    task = Ruler(kind="cwe", lengths=[16_000], samples=1, books=Books(Corpus(tmp_path / "90.txt"), 16_000))
    [record] = measure(task, scripted_subject(count_words))
    assert record["measures"][0][2] == 1.0 and record["tokens"] > 15_000
    task = Ruler(kind="cwe", lengths=[16_000], samples=1, books=Books(Corpus(tmp_path / "9.txt"), 16_000))
    with pytest.raises(ValueError, match=r"different words or more, and 9 holds 9 of 4 to 12 letters. Give more text"):
        task.check(scripted_subject(count_words))


def test_ruler_gives_part_of_the_score_for_part_of_the_answers(books):
    task = Ruler(kind="niah_multivalue", lengths=[3000], samples=2, books=books)
    half = scripted_subject(lambda prompt: ", ".join(read_needles(prompt).split(", ")[:2]))
    assert scores(measure(task, half)) == {("recall", None): 0.5}


def test_prompts_are_the_same_in_every_run(books):
    runs = [scripted_subject(read_needles) for _ in range(2)]
    for subject in runs:
        measure(Ruler(kind="niah_multikey_1", lengths=[3000], samples=2, books=books), subject)
    assert runs[0].model.prompts == runs[1].model.prompts
    other = scripted_subject(read_needles)
    measure(Ruler(kind="niah_multikey_1", lengths=[3000], samples=2, books=books, seed=1), other)
    assert other.model.prompts != runs[0].model.prompts


def test_a_prompt_does_not_hang_on_those_before_it(books):
    """So that a run shared among processes, or resumed, asks the same."""
    for task in (
        Passkey(lengths=[2000], depths=[0, 0.5], seeds=3),
        Passkey(lengths=[2000], depths=[0, 0.5], seeds=3, books=books),
        Ruler(kind="niah_multikey_2", lengths=[3000], samples=4),
    ):
        in_order, backwards = (scripted_subject(silent) for _ in range(2))
        measure(task, in_order)
        for item in reversed(list(task.items(backwards))):
            item.measure()
        assert in_order.model.prompts == backwards.model.prompts[::-1]


@pytest.mark.parametrize("fixed", [0, 90])
@pytest.mark.parametrize("unit", [1, 7, 45])
def test_fitting(fixed, unit):
    asked = []

    def tokens(n):
        asked.append(n)
        return fixed + unit * n

    for budget in (100, 1000, 30_000):
        n = fit_filler(tokens, budget)
        assert budget - max(4, budget // 200) - unit <= tokens(n) <= budget
    assert len(asked) < 40
    with pytest.raises(ValueError, match=r"has 101 tokens, but the length leaves room for 100"):
        fit_filler(lambda n: 101 + n, 100)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_topics(tmp_path):
    rows = [
        {"prompt": f"Topics: {', '.join(topics)}. The first?", "topics": topics}
        for topics in (["the role of art", "sport"], ["Ants!", "bees", "cats"])
    ]
    task = Topics(source=write(tmp_path / "topics.jsonl", rows))
    first = scripted_subject(lambda prompt: "It was: " + prompt[8:].split(",")[0].upper())
    assert scores(measure(task, first)) == {("accuracy", g): 1.0 for g in (None, "2 topics", "3 topics")}
    assert set(scores(measure(task, scripted_subject(silent))).values()) == {0.0}


def multidoc_rows(n: int = 3, passages: int = 5) -> list[dict]:
    return [
        {
            "question": f"Who won race {i}?",
            "answers": [f"Runner {i}", "nobody"],
            "ctxs": [
                {"title": f"T{j}", "text": f"Runner {i} won race {i}." if not j else f"filler {j}", "isgold": not j}
                for j in range(passages)
            ],
        }
        for i in range(n)
    ]


def test_multidoc_by_place_of_the_gold(tmp_path):
    task = MultiDoc(source=write(tmp_path / "nq.jsonl", multidoc_rows()), places=[0, 0.5, 1])

    def read_document_1(prompt: str) -> str:
        return " " + re.search(r"Document \[1\]\(Title: .*?\) (.*)", prompt).group(1)

    subject = scripted_subject(read_document_1)
    records = measure(task, subject)
    assert scores(records) == {
        ("accuracy", None): pytest.approx(1 / 3),
        ("accuracy", "gold at 1 of 5"): 1.0,
        ("accuracy", "gold at 3 of 5"): 0.0,
        ("accuracy", "gold at 5 of 5"): 0.0,
    }
    assert {len(cell.units) for cell in collect_cells(records).values()} == {3}, "a question at 3 places is one unit"
    assert subject.model.prompts[1].count("Document [") == 5
    assert "Document [3](Title: T0) Runner 0 won" in subject.model.prompts[1]
    assert subject.model.prompts[0].endswith("Question: Who won race 0?\nAnswer:")


def test_long_qa_in_both_formats(tmp_path):
    alpaca = {"instruction": "Book. Who ran? ", "input": "", "output": "The dog ran fast"}
    bench = {"context": "c " * 50, "input": "Who?", "answers": ["a dog", "the cat"], "dataset": "hotpotqa"}
    report = {**bench, "dataset": "gov_report", "answers": ["one two three four"]}
    task = LongQA(source=write(tmp_path / "mixed.jsonl", [alpaca, bench, report]))
    records = measure(task, scripted_subject(lambda prompt: "dog ran one two"))
    by_dataset = {r["dataset"]: {m: v for m, _, v, _ in r["measures"]} for r in records}
    # words in common over all: 2 of (4, 3 without "the"); "dog" of (4, 1); LCS 2 of (4, 4)
    assert by_dataset == {
        "mixed": {"f1": pytest.approx(4 / 7), "rougeL": pytest.approx(2 * 2 / (4 + 4))},
        "hotpotqa": {"f1": pytest.approx(2 / 5)},
        "gov_report": {"rougeL": pytest.approx(4 / 8)},
    }
    assert {r["dataset"]: r["protocol"] for r in records} == {
        "mixed": "longalpaca",
        "hotpotqa": "longbench's scores, own prompts",
        "gov_report": "longbench's scores, own prompts",
    }


def test_records_come_as_lines_or_as_one_list(tmp_path):
    """LongAlpaca-12k.json is a list."""
    rows = [{"instruction": f"Book. Who ran {i}?", "output": "A dog"} for i in range(3)]
    (tmp_path / "alpaca.v2.json").write_text(json.dumps(rows, indent=1))
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    records = measure(LongQA(source=str(tmp_path), samples=2), scripted_subject(lambda prompt: "dog"))
    assert [r["dataset"] for r in records] == ["alpaca.v2"] * 2 + ["lines"] * 2
    assert {r["measures"][0][2] for r in records} == {1.0}
    (tmp_path / "alpaca.v2.json").write_text(json.dumps([*rows, {"output": "x"}]))
    with pytest.raises(ValueError, match=r"alpaca.v2.json, record 4: a record with the fields \['output'\]"):
        LongQA(source=str(tmp_path)).data()


def test_long_prompts_lose_their_middle_and_are_counted(tmp_path):
    row = {"context": "B" * 600 + "E" * 600, "input": "Q?", "answers": ["x"], "dataset": "hotpotqa"}
    template = write(tmp_path / "prompts.json", [{"hotpotqa": "<{context}|{input}>"}])
    task = LongQA(source=write(tmp_path / "long.jsonl", [row]), max_length=232, prompts=template)
    subject = scripted_subject(silent)
    [record] = measure(task, subject)
    assert subject.model.prompts == ["<" + "B" * 99 + "E" * 96 + "|Q?>"]
    assert record["cut_tokens"] == 1205 - 200 and record["tokens"] == 200 and record["protocol"] == "longbench"


def multidoc(path, **change) -> None:
    [row] = multidoc_rows(1)
    MultiDoc(source=write(path / "m.jsonl", [{**row, **change}])).data()


def longbench(path, prompts=None, max_length=None, **change) -> None:
    row = {"context": "c", "input": "Who?", "answers": ["a"], "dataset": "hotpotqa", **change}
    if prompts is not None:
        (path / "prompts.json").write_text(json.dumps(prompts))
        prompts = str(path / "prompts.json")
    task = LongQA(source=write(path / "b.jsonl", [row]), prompts=prompts, max_length=max_length)
    task.data()
    task.check(scripted_subject(silent))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Ruler(kind="niah_single_2"), "Give books="),
        (lambda p: Ruler(kind="qa_1"), "'qa_1' is unknown"),
        (lambda p: Passkey(depths=[1.5]), "depth 150% is outside"),
        (lambda p: Topics(source=str(p / "no.jsonl")).data(), "no such file"),
        (lambda p: Topics(source=write(p / "t.jsonl", [{"prompt": "x"}])).data(), "t.jsonl:1: no 'topics'"),
        (lambda p: Topics(source=write(p / "t.jsonl", [{"prompt": "x", "topics": []}])).data(), r"texts: '\[\]'"),
        (lambda p: Topics(source=write(p / "t.jsonl", [{"prompt": "x", "topics": "a"}])).data(), "list of texts.*'a'"),
        (
            lambda p: Topics(source=write(p / "t.jsonl", [{"prompt": 3, "topics": ["a"]}])).data(),
            "no 'prompt', or.*'3'",
        ),
        (lambda p: MultiDoc(source=write(p / "m.jsonl", [[1]])).data(), "m.jsonl, record 1: no 'question'"),
        (lambda p: multidoc(p, answers=[""]), "no 'answers', or it is not a list of texts"),
        (lambda p: multidoc(p, answers="Runner"), "no 'answers', or it is not a list of texts"),
        (lambda p: multidoc(p, ctxs=["text"]), "not a list of passages"),
        (lambda p: multidoc(p, ctxs=[{"text": "t", "isgold": True}]), "with title and text"),
        (lambda p: MultiDoc(source=write(p / "e.jsonl", [])).data(), "e.jsonl: nothing in it"),
        (lambda p: multidoc(p, ctxs=[]), "m.jsonl:1: 0 passages are gold"),
        (lambda p: LongQA(source=write(p / "l.jsonl", [{"text": "x"}])).data(), "neither LongAlpaca's"),
        (lambda p: LongQA(source=write(p / "l.jsonl", [[1]])).data(), "neither LongAlpaca's"),
        (
            lambda p: LongQA(source=write(p / "l.jsonl", [{"instruction": "a", "output": "b", "system": "S"}])).data(),
            "l.jsonl:1: the record: holds 'system', which is not read",
        ),
        (lambda p: LongQA(source=write(p / "l.jsonl", [{"instruction": "a", "output": 5}])).data(), "no 'output'.*'5'"),
        (lambda p: LongQA(source=write(p / "l.jsonl", [{"instruction": "a", "output": ""}])).data(), "no 'output'"),
        (lambda p: longbench(p, dataset="triviaqa"), "'triviaqa' is not one of narrativeqa"),
        (lambda p: longbench(p, answers="a"), "no 'answers'"),
        (lambda p: longbench(p, input=None), "no 'input'"),
        (lambda p: longbench(p, prompts={"qasper": "{context}{input}"}), "has no prompt for 'hotpotqa'"),
        (lambda p: longbench(p, prompts=["{context}"]), "not an object of prompts by data set"),
        (lambda p: longbench(p, prompts={"hotpotqa": "Why?"}), "each with {context} in it"),
        (lambda p: longbench(p, max_length=32), "hotpotqa take 32 tokens, which leaves no room for a prompt in 32"),
    ],
)
def test_bad_records_are_refused(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path)


def test_chat_needs_a_template(books):
    subject = scripted_subject(read_passkey)
    with pytest.raises(ValueError, match="no chat template"):
        measure(Passkey(lengths=[1000], depths=[0], seeds=1, chat=True), subject)
    subject.tokenizer.chat_template = "<u>{{ messages[0].content }}</u>{% if add_generation_prompt %}<a>{% endif %}"
    [record] = measure(Passkey(lengths=[1000], depths=[0], seeds=1, chat=True), subject)
    assert subject.model.prompts[0].endswith("What is the pass key?</u><a>The pass key is")
    assert record["protocol"] == "longlora, chat template" and record["measures"][0][2] == 1

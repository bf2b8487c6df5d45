"""Two runs side by side: differences of the same questions, and of nothing else."""

import json

import pytest
import torch

from peft_longlora.eval import Corpus, Passkey, Perplexity, Results, Subject, compare, evaluate
from peft_longlora.eval.report.side_by_side import make_comparison
from peft_longlora.eval.report.tables import make_report
from tests.helpers.answering_models import Bigrams, letter_tokenizer, read_passkey, scripted_subject
from tests.helpers.evaluated import letter_subject, letter_tasks, letters, longlora


def test_a_run_compared_with_itself_differs_in_nothing(tmp_path):
    evaluate(letter_subject(), letter_tasks(tmp_path), tmp_path / "out")
    found, notes = compare(tmp_path / "out", tmp_path / "out")
    assert found and all((d.value, d.low, d.high) == (0, 0, 0) and d.is_paired for d in found) and not notes


def test_samples_that_are_not_in_the_results_are_not_in_their_comparison(tmp_path):
    """A folder keeps the prompts of all its runs; results.json is of the last one."""
    subject = scripted_subject(lambda prompt: read_passkey(prompt) if prompt.count("grass") % 2 else "no")
    for depths in ([0, 0.13, 0.29, 0.5, 0.71, 1], [0.29, 0.71]):
        evaluate(subject, [Passkey(lengths=[1000], depths=depths, seeds=3)], tmp_path / "a")
    evaluate(scripted_subject(read_passkey), [Passkey(lengths=[1000], depths=[0.29, 0.71], seeds=3)], tmp_path / "b")
    row = next(r for r in Results.load(tmp_path / "a").results if r.group is None)
    found, notes = compare(tmp_path / "a", tmp_path / "b")
    assert found[0].value == pytest.approx(1 - row.value) and found[0].low is None
    assert found[1].low is not None, "rows of one depth are of the same prompts"
    assert [note for note in notes if "holds prompts that its results.json is not made of" in note]


def test_compare_refuses_what_it_cannot_compare(tmp_path, capsys):
    evaluate(scripted_subject(read_passkey), [Passkey(lengths=[1000], depths=[0], seeds=1)], tmp_path / "a")
    evaluate(scripted_subject(read_passkey), [Passkey(lengths=[2000], depths=[0], seeds=1)], tmp_path / "b")
    newer = json.loads((tmp_path / "a" / "results.json").read_text())
    (tmp_path / "newer.json").write_text(json.dumps({**newer, "schema_version": 2}))
    (tmp_path / "other.json").write_text('{"x": 1}')
    capsys.readouterr()
    for second, message in {
        "b": "no task, data, protocol and length in common",
        "none": "no such file",
        "newer.json": "schema_version 2 is newer than 1",
        "other.json": "not a results.json of `longlora eval`",
    }.items():
        assert longlora("compare", tmp_path / "a", tmp_path / second) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
    assert longlora("compare", tmp_path / "a", tmp_path / "a", "--output", tmp_path / "newer.json") == 2
    assert "newer.json is a file. Give a folder." in capsys.readouterr().err


# -- the same question, or none ------------------------------------------------------------------------------------


def run(subject, task, folder):
    evaluate(subject, [task], folder, show_progress=False)
    return folder


def test_perplexities_over_other_tokens_are_not_judged_and_bits_per_byte_are(tmp_path):
    """The second model knows letters by other numbers and predicts them evenly, which is better on these texts."""
    even = Subject.of(Bigrams(torch.full((4, 4), 0.25)), letter_tokenizer("badc"))
    first = run(letter_subject(), Perplexity(letters(tmp_path), [8, 32]), tmp_path / "a")
    second = run(even, Perplexity(letters(tmp_path), [8, 32]), tmp_path / "b")
    found, notes = compare(first, second)
    for difference in found:
        if difference.first.metric == "perplexity":
            assert difference.verdict == "other tokens, not judged"
            assert not difference.is_paired and difference.low is None and difference.value != 0
        else:
            assert difference.is_paired and difference.verdict == "better"
    bits = [d for d in found if d.first.metric == "bits_per_byte"]
    assert [d.second.value for d in bits] == [2.0, 2.0], "two bits a letter, whatever the window"
    assert any(note.startswith("The tokenizers differ") for note in notes)


def test_two_documents_are_too_few_for_a_verdict(tmp_path):
    """The reported case: "better" stood beside an interval from the one document to the other."""
    corpus = tmp_path / "two"
    corpus.mkdir()
    for name, text in (("a", "abcd" * 20), ("b", "aabbccdd" * 10)):
        (corpus / f"{name}.txt").write_text(text)
    even = Subject.of(Bigrams(torch.full((4, 4), 0.25)), letter_tokenizer())
    first, second = (
        run(subject, Perplexity(Corpus(corpus), [8]), tmp_path / name)
        for subject, name in ((letter_subject(), "first"), (even, "second"))
    )
    found, _ = compare(first, second)
    assert found and {(d.verdict, d.low, d.high) for d in found} == {("too few documents", None, None)}
    assert all(d.value for d in found) and all(d.is_paired for d in found)
    text = make_comparison(*compare(first, second), ("first", "second"))
    assert "| too few documents |" in text and "better" not in text and "worse" not in text
    rows = Results.load(first).results
    assert {(row.low, row.high, row.units) for row in rows} == {(None, None, 2)}
    assert make_report(Results.load(first)).count("too few documents") >= len(rows)


def test_other_text_of_one_name_is_not_judged(tmp_path):
    """Two corpora may be called the same; the rows are shown, and neither is better."""
    first = run(letter_subject(), Perplexity(letters(tmp_path), [8]), tmp_path / "a")
    other = tmp_path / "other" / "letters"
    other.mkdir(parents=True)
    for i in range(5):
        (other / f"{i}.txt").write_text("dcba" * 20)
    second = run(letter_subject(), Perplexity(Corpus(other), [8]), tmp_path / "b")
    found, notes = compare(first, second)
    assert {d.first.metric for d in found} == {"perplexity", "bits_per_byte"}
    assert {(d.verdict, d.is_paired, d.low) for d in found} == {("other text, not judged", False, None)}
    assert "perplexity (documents): not the same data, so differences are not paired." in notes


def test_other_text_of_one_protocol_says_nothing_of_the_other(tmp_path):
    """The protocols of a task have data of their own: one may be measured again on other text."""
    other = tmp_path / "other" / "letters"
    other.mkdir(parents=True)
    for i in range(5):
        (other / f"{i}.txt").write_text("dcba" * 20)
    documents, longlora = letter_tasks(tmp_path)
    evaluate(letter_subject(), [documents, longlora], tmp_path / "a", show_progress=False)
    evaluate(letter_subject(), [Perplexity(Corpus(other), [8]), longlora], tmp_path / "b", show_progress=False)
    found, notes = compare(tmp_path / "a", tmp_path / "b")
    verdicts = {(d.first.protocol, d.verdict.startswith("other text"), d.is_paired) for d in found}
    assert verdicts == {("documents", True, False), ("longlora", False, True)}
    assert [note for note in notes if "not the same data" in note] == [
        "perplexity (documents): not the same data, so differences are not paired."
    ]


def test_prompts_of_equal_names_that_are_other_texts_are_not_paired(tmp_path):
    """As a run of before had them: the name of a prompt stood for what the longest length made of it."""
    task = Passkey(lengths=[1000], depths=[0, 1], seeds=2)
    first = run(scripted_subject(read_passkey), task, tmp_path / "a")
    second = run(scripted_subject(lambda prompt: "no"), task, tmp_path / "b")
    assert all(d.is_paired for d in compare(first, second)[0])
    lines = [json.loads(line) for line in (second / "samples.jsonl").open()]
    for content in ("0" * 16, None):
        lines[0]["content"] = content
        (second / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found, notes = compare(first, second)
        paired = {d.first.group: d.is_paired for d in found}
        assert paired == {None: False, "depth 0%": False, "depth 100%": True}
        assert any(note.startswith("passkey 1000: 1 of 4 documents or prompts") for note in notes)


def test_what_differs_is_said(tmp_path):
    """Settings by their names, versions, and what one has measured alone."""
    first = run(letter_subject(), Perplexity(letters(tmp_path), [8, 16], stride=4), tmp_path / "a")
    second = run(letter_subject(), Perplexity(letters(tmp_path), [8], stride=8, max_windows=3), tmp_path / "b")
    content = json.loads((second / "results.json").read_text())
    content["versions"]["transformers"] = "5.0.0"
    content["model"]["dtype"] = "bfloat16"
    (second / "results.json").write_text(json.dumps(content))
    found, notes = compare(first, second)
    assert not any(d.is_paired for d in found), "other windows are other questions"
    assert {d.verdict for d in found} == {"other settings, not judged"}
    text = "\n".join(notes)
    assert "perplexity (documents): not the same settings: stride: 4 and 8; max_windows: None and 3." in text
    assert "dtype: None and bfloat16." in text and " and 5.0.0." in text
    assert "Only in the first: perplexity (documents) 8, bits_per_byte; perplexity (documents) 16, " in text


def test_buckets_change_no_headline(tmp_path):
    first = run(letter_subject(), Perplexity(letters(tmp_path), [16], buckets=[4, 8]), tmp_path / "a")
    second = run(letter_subject(), Perplexity(letters(tmp_path), [16], buckets=[8]), tmp_path / "b")
    found = compare(first, second)[0]
    assert {d.first.group for d in found} == {None, "8-16"} and {d.verdict for d in found} == {"no difference shown"}


def test_nothing_in_common_is_said_with_what_there_is(tmp_path):
    first = run(letter_subject(), Perplexity(letters(tmp_path), [8], "longlora", stride=4), tmp_path / "a")
    second = run(letter_subject(), Perplexity(letters(tmp_path), [8]), tmp_path / "b")
    with pytest.raises(ValueError, match=r"in common. Only in the first: perplexity \(longlora\) 8, perplexity. Only"):
        compare(first, second)


# -- files of others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"key": "passkey/x", "measures": [["accuracy", null, NaN, 1]]}', "line 1, is damaged (nan is not a number"),
        (b'{"key": "pass', "line 1, is damaged (JSONDecodeError"),
        (
            b'{"key": "x", "measures": [["f1", null, 1, 1]]}',
            "a sample lacks what every sample has (KeyError: 'task')",
        ),
    ],
)
def test_a_damaged_sample_is_named_and_gives_no_interval(tmp_path, line, said):
    task = Passkey(lengths=[1000], depths=[0, 1], seeds=2)
    first = run(scripted_subject(read_passkey), task, tmp_path / "a")
    second = run(scripted_subject(lambda prompt: "no"), task, tmp_path / "b")
    lines = (second / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (second / "samples.jsonl").write_bytes(line + b"\n" + b"".join(lines[1:]))
    found, notes = compare(first, second)
    assert [d.value for d in found] == [-1] * 3 and not any(d.low or d.is_paired for d in found)
    assert any(str(second / "samples.jsonl") in note and said in note for note in notes)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("results", 0, "value"), "high", "value must be a finite number"),
        (("results", 0, "value"), 0.1, "value must be between low and high"),
        (("results", 0, "length"), "8", "length must be a number of 0 or more"),
        (("results", 0, "units"), None, "units must be a number of 0 or more"),
        (("details", 0, "group"), 5, "group must be text or null"),
        (("results", 0, "higher_is_better"), "yes", "higher_is_better must be true or false"),
        (("settings", "seed"), "zero", "settings: seed must be a number from 0"),
        (("settings", "confidence"), 2, "confidence must be a number from 0 to 1"),
        (("model",), [], "model must be an object"),
        (("details",), None, "not a results.json of `longlora eval`"),
    ],
)
def test_a_damaged_value_is_named_with_its_file(tmp_path, path, value, said):
    folder = run(scripted_subject(read_passkey), Passkey(lengths=[1000], depths=[0, 1], seeds=1), tmp_path / "a")
    content = place = json.loads((folder / "results.json").read_text())
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (folder / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        compare(folder, folder)
    assert str(folder / "results.json") in str(error.value) and said in str(error.value)


def test_names_of_others_stay_text_in_the_tables(tmp_path):
    """A data set's name is no heading, no column, no HTML, and no sequence for the terminal."""
    folder = run(scripted_subject(read_passkey), Passkey(lengths=[1000], depths=[0, 1], seeds=1), tmp_path / "a")
    content = json.loads((folder / "results.json").read_text())
    for each in content["results"] + content["details"]:
        each["dataset"] = "a|b\n# Heading <img src=x> \x1b[2J"
    (folder / "results.json").write_text(json.dumps(content))
    differences, notes = compare(folder, folder)
    for text in (make_comparison(differences, notes, ("x|y", "<b>")), make_report(Results.load(folder))):
        assert "\n# Heading" not in text and "<img" not in text and "<b>" not in text and "\x1b" not in text
        rows = [line for line in text.splitlines() if line.startswith("| passkey")]
        assert rows and len({line.replace("\\\\|", "").count("|") for line in rows}) == 1

"""Two runs side by side: differences of the same questions, and of nothing else."""

import json

import pytest

from peft_longlora.eval import Passkey, Results, compare, evaluate
from tests.helpers.answering_models import read_passkey, scripted_subject
from tests.helpers.evaluated import letter_subject, letter_tasks, longlora


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
        "other.json": "no results.json of `longlora eval`",
    }.items():
        assert longlora("compare", tmp_path / "a", tmp_path / second) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
    assert longlora("compare", tmp_path / "a", tmp_path / "a", "--output", tmp_path / "newer.json") == 2
    assert "newer.json is a file. Give a folder." in capsys.readouterr().err

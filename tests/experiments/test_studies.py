"""Studies with wrong values are refused when they are read, and results files outlive a run that is stopped."""

import fcntl
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.experiments.conftest import STUDY
from tests.helpers.paths import ROOT

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import cells
import run
from books import Books
from cells import append_line, read_lines, read_study
from metrics import check_measures
from train import make_model
from transformers import AutoTokenizer

CELL = {"name": "full"}
WRONG = [
    ({"training": {"steps": -1}}, "steps=-1 must be a number of steps"),
    ({"training": {"steps": 1.5}}, "steps=1.5 must be a number of steps"),
    ({"training": {"warmup_steps": None}}, "warmup_steps=None"),
    ({"training": {"learning_rate": "2e-4"}}, "with the dot"),
    ({"training": {"learning_rate": float("nan")}}, "learning_rate=nan must be a number"),
    ({"training": {"decay": 2}}, "decay=2 must be a number of 0 or more, 1 at most"),
    ({"training": {"max_grad_norm": -1}}, "max_grad_norm=-1"),
    ({"training": {"rows": 0}}, "rows=0 must be"),
    ({"training": {"rows": 2}, "data": "records"}, "rows=2 chooses rows of books"),
    ({"training": {"bf16": "no"}}, "bf16='no' must be true or false"),
    ({"training": {"gradient_checkpointing": 1}}, "gradient_checkpointing=1 must be"),
    ({"training": {"skip_positions": True}, "config": {"skip_positions": True}}, "Say it in one of them"),
    ({"evaluation": {"edges": [0, 32]}}, "edges=.* must end where rows do, at window=96"),
    ({"evaluation": {"edges": [0, 96, 200]}}, "edges=.* must end where rows do, at window=96"),
    ({"evaluation": {"edges": [0, 64, 32, 96]}}, "rises from 0"),
    ({"evaluation": {"edges": [32, 96]}}, "rises from 0"),
    ({"evaluation": {"native_window": 0}}, "native_window=0"),
    ({"evaluation": {"passkeys": 0}}, "passkeys=0"),
    ({"evaluation": {"passkey_lengths": 224}}, "passkey_lengths=224"),
    ({"evaluation": {"passkey_lengths": ["224"]}}, "passkey_lengths="),
    ({"evaluation": {"memorised": True}}, "memorised=True"),
    ({"evaluation": {"ruler": -1}}, "ruler=-1"),
    ({"evaluation": {"memorised": 2}, "training": {"steps": 0}}, "no text that memorised"),
    ({"budgets": ["tokens", "time"], "training": {"steps": 0}}, "equal time with no step"),
    ({"seeds": 3}, "seeds=3 must be a list"),
    ({"seeds": [0, 0]}, "seeds="),
    ({"budgets": ["tokes"]}, "budgets="),
    ({"window": 2}, "window=2 must be"),
    ({"config": None}, "config=None must be a mapping"),
    ({"title": 5}, "title=5 is no text"),
    ({"cells": ["full"]}, "must be a list of mappings"),
    ({"cells": [{**CELL, "config": None}]}, "config=None must be a mapping"),
    ({"cells": [{**CELL, "seeds": [7]}]}, r"must be some of the study's, \[0\]"),
    ({"cells": [{**CELL, "budgets": ["tme"]}]}, "budgets="),
    ({"cells": [{**CELL, "window": 200}]}, "must end where rows do, at window=200"),
]


@pytest.mark.parametrize("change, reason", WRONG)
def test_a_value_outside_its_rule_is_refused_when_the_study_is_read(tmp_path, change, reason):
    path = tmp_path / "study.yaml"
    right = dict(window=96, reference="full", cells=[CELL], evaluation={"edges": [0, 32, 96]})
    path.write_text(yaml.safe_dump(right))
    read_study(path)
    path.write_text(yaml.safe_dump({**right, **change}))
    with pytest.raises(ValueError, match=f"study.yaml: .*{reason}"):
        read_study(path)


@pytest.mark.parametrize("text", ["", "- a", "words"])
def test_yaml_that_is_no_study_is_refused(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match="a study is a mapping"):
        read_study(tmp_path / "study.yaml")


def test_what_could_not_be_measured_is_refused_before_the_training(place):
    tokenizer, books = AutoTokenizer.from_pretrained(place / "base"), Books.read(place, "validation")  # 250 and 400
    cell = next(cell for cell in read_study(place / "tiny.yaml").cells if cell.name == "full")
    model, rows = make_model(cell, str(place / "base"), "cpu"), [books[0][:96].tolist()]

    def check(window: int, native: int, length: int, **more) -> None:
        evaluation = dict(native_window=native, passkey_lengths=[length], memorised=None, ruler=None)
        check_measures(model, tokenizer, books, window, evaluation | more, rows)

    check(399, 32, 224)
    for window, native, length, reason in (
        (400, 32, 224, "longest validation book has 400 tokens.*400 is among"),
        (96, 500, 224, "500 is among"),
        (96, 32, 400, "400 is among"),
        (96, 32, 150, "key and question alone have"),
    ):
        with pytest.raises(ValueError, match=reason):
            check(window, native, length)
    with pytest.raises(ValueError, match="memorised: a window of 96 tokens is too short"):
        check(96, 32, 224, memorised=2)
    with pytest.raises(ValueError, match="ruler_niah_single_2 at 224 tokens: The prompt alone"):
        check(96, 32, 224, ruler=1)


def line(cell: str, **more) -> dict:
    return {"cell": cell, "budget": "tokens", "seed": 0, **more}


def test_half_a_line_of_a_stopped_run_is_no_line(tmp_path):
    file = tmp_path / "results" / "tiny.jsonl"
    for name in "ab":
        assert append_line(line(name), file)
    file.write_bytes(file.read_bytes()[:-9])  # stopped while it wrote b
    assert read_lines(file) == [line("a")]
    assert append_line(line("b", again=1), file)
    assert list(map(json.loads, file.read_text().splitlines())) == [line("a"), line("b", again=1)]
    file.write_bytes(file.read_bytes()[:-1])  # an editor that ends no line
    assert append_line(line("c"), file) and len(read_lines(file)) == 3
    text = file.read_text().replace('"seed": 0, "again"', '"seed": 0 "again"')
    file.write_text(text)
    with pytest.raises(ValueError, match=r"tiny\.jsonl, line 2 is not JSON.*Take it out"):
        read_lines(file)


def test_two_runs_do_not_add_a_line_at_the_same_time(tmp_path, monkeypatch):
    """What one run has read holds until its line is there."""
    file, seen = tmp_path / "tiny.jsonl", []

    def read(path):
        with open(path, "ab") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                seen.append("waits")
        return read_lines(path)

    monkeypatch.setattr(cells, "read_lines", read)
    assert append_line(line("a"), file) and not append_line(line("a"), file) and append_line(line("b"), file)
    assert seen == ["waits"] * 3 and read_lines(file) == [line("a"), line("b")]
    with open(file, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it afterwards


def test_the_readmes_study_is_one(tmp_path):
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "tiny.yaml").write_text(re.search(r"```yaml\n(.+?)```", text, flags=re.DOTALL)[1])
    study = read_study(tmp_path / "tiny.yaml")
    assert [str(one) for one in study.cells] == [
        "full, equal tokens, seed 0", "local, equal tokens, seed 0", "local, equal time, seed 0"
    ]  # fmt: skip
    for cell in study.cells:
        make_model(cell, str(ROOT / "examples" / "assets" / "stdlib-llama-512"), "cpu")


@pytest.mark.parametrize("missing", ["train_off", "validation"])
def test_books_that_are_not_there_are_refused_before_a_cell(place, tmp_path, capsys, missing):
    for name in {"train", "train_off", "validation", "validation_off"} - {missing}:
        (tmp_path / f"{name}.npy").write_bytes((place / f"{name}.npy").read_bytes())
    command = [str(place / "tiny.yaml"), "--model", str(place / "base"), "--device", "cpu", "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        run.parse_args([*command, "--tokens", str(tmp_path)])
    assert f"there is no {missing}.npy. Write it with experiments/books.py" in capsys.readouterr().err


def test_two_runs_of_a_cell_leave_one_line(tmp_path):
    file = tmp_path / "tiny.jsonl"
    assert append_line(line("a", first=1), file)
    assert not append_line(line("a", first=2), file)
    assert append_line({**line("a"), "seed": 1}, file)
    assert [one.get("first") for one in read_lines(file)] == [1, None]


@pytest.fixture
def command(place, tmp_path):
    common = ["--model", str(place / "base"), "--tokens", str(place), "--device", "cpu", "--results", str(tmp_path)]
    return [str(place / "tiny.yaml"), *common]


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--seeds", "7"], "--seeds 7: no study has a cell of this seed"),
        (["--only", "nosuch"], "--only nosuch: no study has a cell of this name"),
    ],
)
def test_a_choice_that_no_cell_answers_to_is_refused(command, capsys, options, reason):
    with pytest.raises(SystemExit) as stop:
        run.main([*command, *options, "--list"])
    assert stop.value.code == 2 and reason in capsys.readouterr().err


def test_a_broken_line_stops_the_run_once(command, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text('{"cell": \n')
    with pytest.raises(SystemExit):
        run.main(command)
    assert "other.jsonl, line 1 is not JSON" in capsys.readouterr().err


def test_a_list_writes_nothing(command, tmp_path, capsys):
    study = yaml.safe_load(STUDY)
    (tmp_path / "twin.yaml").write_text(yaml.safe_dump(study))
    for cell in read_study(tmp_path / "twin.yaml").cells[:1]:
        known = dict(study="other", cell="a", budget="tokens", seed=0, fingerprint=cell.fingerprint)
        known |= dict(settings=cell.settings, hardware={"device": "a GPU"}, metrics={})
        append_line(known, tmp_path / "other.jsonl")
    before = (tmp_path / "other.jsonl").read_bytes()
    assert run.main([str(tmp_path / "twin.yaml"), *command[1:], "--list"]) == 0
    assert "the same run as a of other" in capsys.readouterr().out
    assert [file.name for file in tmp_path.glob("*.jsonl")] == ["other.jsonl"]
    assert (tmp_path / "other.jsonl").read_bytes() == before


def test_cells_with_and_without_ligers_kernels_run_apart(place, tmp_path, command, monkeypatch, capsys):
    study = yaml.safe_load(STUDY)
    study["cells"][2]["training"] = {"liger": True}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.setattr(run, "is_liger_kernel_available", lambda: False)
    for only, reason in ((["full", "last"], "run cells with liger: true and"), (["last"], "pip install liger-kernel")):
        with pytest.raises(SystemExit):
            run.main([str(tmp_path / "mixed.yaml"), *command[1:], "--only", *only])
        assert reason in capsys.readouterr().err

"""The same command again: a complete run trains nothing, and no run goes on with other data or another base."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_longlora.training import last_checkpoint
from peft_longlora.training.checkpoints import begin_output
from peft_longlora.training.completed import is_complete
from tests.helpers.tiny_base import prose, save_base

pytest.importorskip("trl", minversion="1.16")
WEIGHTS = "adapter_model.safetensors"


def test_a_complete_run_trains_nothing_and_makes_what_is_missing(run, place, monkeypatch):
    given = ("--max-steps", 2, "--save-steps", 1)
    assert run(*given)[0] == 0
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    code, said, _, folder = run(*given)
    trained = (folder / WEIGHTS).read_bytes()
    assert code == 0 and "complete with" in said and "nothing is missing" in said
    assert "complete with" in run(*given, "--dry-run")[1]
    assert last_checkpoint(folder).name == "checkpoint-2"

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    measured = ("--eval-data", place / "held.txt", "--eval-lengths", 64)
    code, said, _, _ = run(*given, *measured)
    assert code == 0 and "missing, and made now: the measurement" in said
    results = (folder / "evaluation/results.json").read_bytes()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert "nothing is missing" in run(*given, *measured)[1]
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)

    (folder / WEIGHTS).unlink()
    code, said, _, _ = run(*given, *measured)
    assert code == 0 and "made now: the adapter, the measurement" in said
    ours, theirs = load_file(folder / WEIGHTS), load_file(last_checkpoint(folder) / WEIGHTS)
    assert all((ours[name] == theirs[name]).all() for name in theirs) and (folder / WEIGHTS).read_bytes() == trained
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    again = json.loads((folder / "evaluation/results.json").read_text())
    assert again["results"] == json.loads(results)["results"]

    assert run("--max-steps", 3)[0] == 0 and last_checkpoint(folder).name == "checkpoint-3"


@pytest.mark.parametrize(
    ("step", "epoch", "steps", "epochs", "expected"),
    [
        (4, 0.5, 4, 1.0, True), (4, 0.5, 5, 1.0, False), (4, 1.0, -1, 1.0, True), (4, 1.0, -1, 2.0, False),
        (4, 0.99, -1, 1.0, False), (9, 2.0, -1, 1.0, True),
    ],
)  # fmt: skip
def test_when_a_run_is_complete(tmp_path, step, epoch, steps, epochs, expected):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": epoch}))
    assert is_complete(tmp_path, SimpleNamespace(max_steps=steps, num_train_epochs=epochs)) is expected
    assert not is_complete(None, SimpleNamespace(max_steps=steps, num_train_epochs=epochs))


def test_a_run_of_whole_epochs_is_complete(run, tmp_path):
    """With the epochs that the Trainer itself counts, at a number of rows that its steps do not divide."""
    given = ("--max-steps", -1, "--num-train-epochs", 2, "--gradient-accumulation-steps", 3, "--max-rows", 4)
    assert run(*given)[0] == 0
    last = last_checkpoint(tmp_path / "out").name
    assert "nothing is trained" in run(*given)[1] and last_checkpoint(tmp_path / "out").name == last


def test_a_folder_that_a_person_named_is_no_checkpoint(tmp_path):
    """It is neither gone on from nor deleted."""
    names = ["checkpoint-2", "checkpoint-10", "checkpoint-30-copy", "checkpoint-best"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    begin_output(SimpleNamespace(output_dir=tmp_path, run=SimpleNamespace(overwrite=True), values={}))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == names[2:]


def test_a_run_goes_on_only_with_its_own_rows_and_base(run, tmp_path):
    base, text = save_base(tmp_path / "base"), tmp_path / "a.txt"
    text.write_text(prose(300, 1))
    given = ("--model", base, "--data", text)
    assert run(*given, "--max-steps", 1)[0] == 0
    text.write_text(prose(300, 2))
    for more in ((), ("--dry-run",)):
        code, _, err, _ = run(*given, *more)
        assert code == 2 and "the texts, or what the tokenizer makes of them, have changed" in err
        assert "--overwrite to begin anew" in err
    text.write_text(prose(300, 1))
    weights = load_file(base / "model.safetensors")
    shutil.copy(base / "model.safetensors", tmp_path / "kept")
    save_file({name: each * 1.1 for name, each in weights.items()}, base / "model.safetensors", {"format": "pt"})
    code, _, err, _ = run(*given)
    assert code == 2 and "its weights or its config have changed" in err
    shutil.copy(tmp_path / "kept", base / "model.safetensors")
    code, said, _, folder = run(*given, "--max-steps", 2)
    assert code == 0 and "Going on from" in said
    text.write_text(prose(300, 2))
    assert run(*given, "--max-steps", 1, "--overwrite")[0] == 0
    assert last_checkpoint(folder).name == "checkpoint-1"


@pytest.mark.parametrize(
    ("out", "key", "message"),
    [
        ("books", "data", "is the folder .* of data"),
        ("books/run", "data", "lies in the folder .* of data"),
        (".", "data", "holds the folder .* of data"),
        ("round/run", "data", "lies in the folder"),
        ("elsewhere/run", "data", "lies in the folder"),
        ("held", "eval-data", "is the folder .* of eval_data"),
        ("base", "model", "is the folder of model"),
    ],
)
def test_a_run_does_not_write_among_its_data(run, tmp_path, out, key, message):
    base = save_base(tmp_path / "base")
    for name in ("books", "held", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(prose(100, 1))
    (tmp_path / "round").symlink_to("books")
    (tmp_path / "books/more").symlink_to("../elsewhere")
    place = {"data": tmp_path / "books", "eval-data": tmp_path / "held", "model": base}[key]
    for more in ((), ("--dry-run",)):
        code, _, err, _ = run(f"--{key}", place, *more, out=out)
        lines = [line for line in err.splitlines() if "error: " in line]
        assert code == 2 and len(lines) == 1 and re.search(message, lines[0])
    assert not any(tmp_path.rglob("run.yaml"))

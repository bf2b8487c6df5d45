"""`longlora train` on two processes: rows shared, rows of their own, and FSDP2; against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tests.helpers.paths import ROOT
from tests.helpers.tiny_base import prose, save_base

pytest.importorskip("trl", minversion="1.16")
pytestmark = pytest.mark.slow
HELPERS = ROOT / "tests" / "helpers"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_base(folder / "base")
    for name, seed in (("books", 0), ("held", 9)):
        (folder / f"{name}.txt").write_text(prose(1200, seed))
    recipe = dict(
        model=str(folder / "base"), data=str(folder / "books.txt"), eval_data=str(folder / "held.txt"), max_steps=2,
        eval_lengths=[256], context_length=256, r=4, learning_rate=1e-2, save_strategy="no",
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "command.py").write_text("import sys\nfrom peft_longlora.cli.main import main\nsys.exit(main())\n")
    return folder


def run(place: Path, name: str, launcher: list, *more) -> Path:
    output = place / name
    command = [sys.executable, *launcher, place / "command.py", "train", place / "recipe.yaml", "--output-dir", output]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HOME": str(place / "hub")}
    result = subprocess.run(
        [str(part) for part in (*command, *more)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("The adapter is in") == 1  # one process speaks
    return output


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses(folder: Path) -> list[list[float]]:
    names = ("loss", "loss_0_64", "loss_64_128", "loss_128_256", "num_tokens")
    return [[entry[name] for name in names] for entry in history(folder) if "loss" in entry]


def perplexities(folder: Path) -> list[float]:
    return [row["value"] for row in json.loads((folder / "results.json").read_text())["results"]]


@pytest.fixture(scope="module")
def alone(place):
    """One process with as many rows a step as two processes have."""
    shared = run(place, "one", [])
    both = run(place, "both", [], "--gradient-accumulation-steps", 2)
    return {"shared": shared, "own": both}


TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
FSDP2 = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "examples/accelerate/fsdp2.yaml"]
FSDP2 += ["--num_processes", "2", "--main_process_port", "0", HELPERS / "on_cpu.py"]


@pytest.mark.parametrize(
    ("rows", "launcher", "more"),
    [("shared", TWO, ("--sequence-parallel", 2)), ("own", TWO, ()), ("own", FSDP2, ())],
    ids=["shared", "ddp", "fsdp2"],
)
def test_two_processes_train_and_measure_as_one(place, alone, request, rows, launcher, more):
    found = run(place, request.node.callspec.id, launcher, *more)
    for ours, theirs in zip(losses(found), losses(alone[rows]), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert perplexities(found) == pytest.approx(perplexities(alone[rows]), rel=5e-3)


@pytest.mark.parametrize(("steps", "more"), [(6, ("--sequence-parallel", 2)), (3, ())], ids=["shared", "ddp"])
def test_two_processes_count_the_tokens_of_all_starts(place, steps, more):
    """One epoch, in two starts: every token of the text, its start and its end, once."""
    total = len(AutoTokenizer.from_pretrained(place / "base").tokenize(prose(1400, 3))) + 2
    assert 5 * 256 < total < 6 * 256
    (place / "six_rows.txt").write_text(prose(1400, 3))
    given = ("--data", place / "six_rows.txt", "--eval-data", "null", "--save-strategy", "steps", "--save-steps", 1)
    for until in (1, steps):
        found = run(place, f"stopped-{steps}", TWO, *more, *given, "--max-steps", until)
    counted = [entry["num_tokens"] for entry in history(found) if "num_tokens" in entry]
    assert counted[-1] == total and counted == sorted(counted)
    assert f", {total:,} tokens" in (found / "README.md").read_text()

"""A run from its recipe to its results: what is trained, logged, kept, refused and pushed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_longlora.training import Meter, last_checkpoint
from peft_longlora.training.arguments import CHECKPOINTING, checkpointing
from peft_longlora.training.meter import bucket_edges
from tests.helpers.paths import ROOT
from tests.helpers.tiny_base import prose

pytest.importorskip("trl", minversion="1.16")  # older trainers give no losses of tokens


def logged(folder) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_a_run_ends_with_an_adapter_its_results_and_its_card(run, place):
    code, said, _, folder = run("--eval-data", place / "held.txt", "--eval-lengths", 64, 128, "--language", "en")
    assert code == 0 and "2 read" in said
    losses = [entry["loss"] for entry in logged(folder)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    for entry in logged(folder):
        assert {"loss_0_32", "loss_32_64", "loss_64_128", "tokens_per_second"} <= entry.keys()
    results = json.loads((folder / "results.json").read_text())
    value = next(r["value"] for r in results["results"] if (r["task"], r["length"]) == ("perplexity", 128))
    assert value == pytest.approx(perplexity(place, folder, 128), rel=1e-3)
    card = (folder / "README.md").read_text()
    data = card[card.index("## Data") : card.index("## Results")]
    assert "- Not on the Hub: books\n- Documents or records: 2 read" in data and str(place) not in card
    assert "4 steps of 1 rows, learning rate 0.01, " in data and "Not stated" not in data
    assert f"{value:.1f}" in card and "language: en" in card.replace("language:\n- en", "language: en")
    # Everything is there, so the same command trains no further.
    weights = load_file(folder / "adapter_model.safetensors")
    code, said, _, _ = run("--eval-data", place / "held.txt", "--eval-lengths", 64, 128, "--language", "en")
    assert code == 0 and "nothing is trained" in said
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    )


@torch.no_grad()
def perplexity(place, adapter, length: int) -> float:
    """Of every token but the first, in windows that move by half a window, by plain transformers and PEFT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), adapter).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(place / "base")((place / "held.txt").read_text())["input_ids"])
    total, scored = 0.0, 0
    for start in range(0, len(ids), length // 2):
        stop = min(start + length, len(ids) - 1)
        logits = model(input_ids=ids[None, start:stop]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="none")
        total += losses[scored - start :].sum().item()
        scored = stop
        if stop == len(ids) - 1:
            break
    return torch.tensor(total / scored).exp().item()


def test_losses_by_position_are_those_of_the_tokens(run, place):
    """The buckets' means, weighted by their tokens, are the logged loss: every target is in one bucket."""
    sequential = ("--no-packing", "--train-sampling-strategy", "sequential")
    _, _, _, folder = run("--max-steps", 1, *sequential, "--report-to", "tensorboard")
    (entry,) = logged(folder)
    assert entry["loss"] == pytest.approx(
        (31 * entry["loss_0_32"] + 32 * entry["loss_32_64"] + 64 * entry["loss_64_128"]) / 127, rel=1e-3
    )
    (events,) = folder.rglob("events.out.tfevents.*")
    assert all(name in events.read_bytes() for name in (b"train/loss_32_64", b"train/tokens_per_second"))
    assert bucket_edges(32768) == [512, 1024, 2048, 4096, 8192, 16384]


def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(run):
    """Of a recipe with other values, it says so and refuses."""
    _, _, _, whole = run(out="whole")
    run("--save-steps", 2, "--max-steps", 4, out="parts")
    parts = whole.parent / "parts"
    for name in ("checkpoint-4", "adapter_model.safetensors"):
        shutil.rmtree(parts / name) if (parts / name).is_dir() else (parts / name).unlink()
    code, said, _, _ = run("--save-steps", 2, out="parts")
    assert code == 0 and f"Going on from {parts / 'checkpoint-2'}" in said
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (parts, whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)
    code, _, err, _ = run("--r", 8, out="parts")
    assert code == 2 and re.search(r"holds a run with r=4, and the recipe says 8.*--overwrite", err)
    assert run("--r", 8, "--overwrite", out="parts")[0] == 0
    assert [path.name for path in parts.glob("checkpoint-*")] == ["checkpoint-4"]
    (parts / "checkpoint-9").mkdir()  # cut short: without a trainer's state
    assert last_checkpoint(parts).name == "checkpoint-4"


def test_records_train_on_answers_and_are_measured_on_held_out_ones(run, place):
    given = ("--data", place / "records.jsonl", "--kind", "records", "--eval-data", place / "answers.jsonl")
    code, said, _, folder = run(*given, "--max-steps", 2)
    assert code == 0 and "4 read" in said
    measured = float(re.search(r"Loss of held-out answers, dense attention: ([\d.]+)", said)[1])
    assert 0 < measured < 20 and len(logged(folder)) == 2


def test_dry_run_loads_no_weights_and_writes_nothing(run, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    code, said, _, folder = run("--dry-run")
    assert code == 0 and not folder.exists()
    assert "learning_rate: 0.01" in said and re.search(r"Data: 2 read, [\d,]+ tokens -> \d+ rows", said)
    assert re.search(r"Trained: [\d,]+ of [\d,]+ parameters \(\d+\.\d+%\)", said)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "missing.txt"], "missing.txt: no such file or folder"),
        (["--model", "/nowhere"], "model='/nowhere': no such folder"),
        (["--context-length", "128", "--dense-layers", "7"], "dense_layers=.* names .*7"),
        (["--eval-strategy", "steps"], "eval_strategy and eval_on_start need eval_data"),
        (["--bf16"], "bf16 and fp16 are for GPUs"),
        (["--activation-offloading"], "activation_offloading copies from a GPU, and there is none here"),
        (["--fit-memory"], "fit_memory=True measures on a GPU"),
        (["--report-to", "tensorboard", "--optim", "adamw"], "optim='adamw' is not one of"),
        (["--sequence-parallel", "2"], "sequence_parallel=2 does not divide the 1 processes"),
        (["--report-to", "nobody"], "nobody is not supported"),
        (["--report-to", "wandb"], "requires wandb to be installed"),
        (["--attn-backend", "fast"], "backend='fast' is unknown"),
        (["--output-dir", "/proc/gone/out"], "output_dir='/proc/gone/out' cannot be written .* you may write to"),
        (
            ["--eval-data", "gone.txt"],
            "eval_data, gone.txt, cannot be read: .*--eval-data other-books/.*--eval-data null to",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2_before_the_weights(run, monkeypatch, more, message):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err, folder = run(*more)
    lines = [line for line in err.splitlines() if line.startswith("longlora train: error: ")]
    assert code == 2 and len(lines) == 1 and re.search(message, lines[0])
    assert not folder.exists()


@pytest.mark.parametrize(
    ("given", "fits", "expected"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"gradient_checkpointing": False}, False, False),
        ({"gradient_checkpointing": True}, False, True),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, False, True),
    ],
)
def test_who_checkpoints(tmp_path, given, fits, expected):
    """The Trainer, unless fit_memory does. Under either of transformers' names, and without reentrance by default."""
    from trl import SFTConfig

    made = SFTConfig(tmp_path, use_cpu=True, bf16=False, **{**given, **checkpointing(given, fits)})
    assert all(getattr(made, name, expected) is expected for name in CHECKPOINTING)
    if expected:
        asked = given.get("gradient_checkpointing_kwargs", {"use_reentrant": False})
        assert made.gradient_checkpointing_kwargs == asked


def test_training_data_is_not_held_out_data(run, place):
    for name, text in (("copy/1.txt", prose(200, 1)), ("copy/2.jsonl", json.dumps({"text": prose(300, 0)}))):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    (place / "same.jsonl").write_text((place / "records.jsonl").read_text())
    records = ("--kind", "records", "--data", place / "records.jsonl")
    for given, names in (
        (["--eval-data", place / "books"], "books', which is training data: '.*books'"),
        (["--eval-data", place / "books/0.txt"], r"books/0\.txt', .*books/0\.txt' is the same text \(1 of 1 held-out"),
        (
            ["--eval-data", place / "held.txt", place / "copy/1.txt"],
            r"copy/1\.txt', .*books/1\.txt' is .*\(1 of 2 held",
        ),
        (["--eval-data", place / "copy/2.jsonl"], r"copy/2\.jsonl:1', .*books/0\.txt' is the same text"),
        ([*records, "--eval-data", place / "same.jsonl"], r"same\.jsonl:1', .*records\.jsonl:1' .*\(4 of 4 held"),
    ):
        code, _, err, out = run("--dry-run", *given)
        assert code == 2 and "which is training data" in err and re.search(names, err) and not out.exists(), err
    for given in (["--eval-data", place / "held.txt"], [*records, "--eval-data", place / "answers.jsonl"]):
        assert run("--dry-run", *given)[0] == 0
    tree = ("--repositories", "--data", place / "books", "--eval-data", place / "books/0.txt")
    code, _, err, _ = run("--dry-run", *tree)
    assert code == 2 and re.search(r"books/0\.txt', which is training data: .*books'", err)


def test_a_folder_with_an_adapter_is_not_written_over(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/adapter_config.json").write_text("{}")
    code, _, err, _ = run()
    assert code == 2 and "holds an adapter and no checkpoint to go on from" in err


def test_a_signal_ends_training_after_the_step_with_a_checkpoint(run, monkeypatch):
    begin, steps = Meter.begin, []

    def begin_and_stop(self, inputs):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        begin(self, inputs)

    monkeypatch.setattr(Meter, "begin", begin_and_stop)
    code, said, err, folder = run("--max-steps", 50)
    assert code == 130 and len(steps) == 2
    assert "Stopped after step 2." in said and "checkpoint-2 is kept" in said and "Stopping after this step" in err
    assert last_checkpoint(folder).name == "checkpoint-2"
    code, said, _, _ = run("--max-steps", 3)
    assert code == 0 and len(steps) == 3 and "Going on from" in said


def test_a_step_that_runs_out_of_memory_names_the_switch(run, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. " + 40 * "More. ")

    monkeypatch.setattr(torch.Tensor, "backward", fail)
    code, _, error, _ = run("--gradient-checkpointing", "false")
    assert code == 2 and "More." not in error
    assert "No block is checkpointed: call peft_longlora.memory.checkpoint_blocks(model)" in error
    assert "Use a smaller context_length, four_bit" in error.splitlines()[-1]


def test_a_second_ctrl_c_ends_at_once(run, monkeypatch):
    def stop(self, inputs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Meter, "begin", stop)
    code, _, err, folder = run()
    assert code == 130 and "Stopped at once. Checkpoints in output_dir are kept" in err
    assert last_checkpoint(folder) is None


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(place, tmp_path):
    command = [sys.executable, "-m", "peft_longlora", "train", str(place / "recipe.yaml"), "--max-steps", "500"]
    command += ["--output-dir", str(tmp_path / "out"), "--disable-tqdm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("{'loss'") and "Stopping" not in said:
            process.send_signal(signal.SIGINT)
            break
    said += process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    step = int(re.search(r"Stopped after step (\d+)", said)[1])
    assert step < 500 and last_checkpoint(tmp_path / "out").name == f"checkpoint-{step}"


@pytest.mark.slow
def test_a_meter_counts_tokens_of_all_processes():
    meter = Meter(64)
    meter.begin({"input_ids": torch.zeros(1, 10, dtype=torch.long)})
    meter.begin(
        {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    )
    seen = []
    meter.read(lambda sums: seen.append(sums[-1].item()) or sums * 2, torch.device("cpu"))
    assert seen == [17.0]

"""Every script of benchmarks/ runs, on shapes for a CPU: it says what it measured, and what it computed is right."""

import gzip
import hashlib
import json
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from peft_longlora.kernels.flash import FlashAttention4
from tests.helpers.paths import EMBEDDED, ROOT
from tests.helpers.plain_kernel import FlashAttention4Interface
from tests.helpers.ranks import run_ranks

FOLDER = ROOT / "benchmarks"
LIBRARIES = {"measure.py", "options.py", "shapes.py", "ways.py"}  # imported by the scripts
LIBRARIES |= {"float8.py", "float8_kernel.py", "training_model.py", "training_others.py", "timed_steps.py"}
LIBRARIES |= {f"scaling_{name}.py" for name in ("check", "memory", "prediction", "step", "traffic", "weights")}


def run(script: str, *arguments) -> None:
    """`python benchmarks/<script> <arguments>`, without the imports of a new process."""
    path = str(FOLDER / script)
    with (
        mock.patch.object(sys, "argv", [path, *map(str, arguments)]),
        mock.patch.object(sys, "path", [str(FOLDER), *sys.path]),
    ):
        runpy.run_path(path, run_name="__main__")


def test_every_script_is_run_here():
    text = Path(__file__).read_text()
    assert not [
        path.name for path in FOLDER.glob("*.py") if path.name not in LIBRARIES and f'"{path.name}"' not in text
    ]


def test_attention(tmp_path):
    """It ends with an error where a method is wrong."""
    run("attention.py", "--tiny", "--device", "cpu", "--seconds", 0.001, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [case["name"] for case in found["cases"]] == ["tiny 4/2", "tiny packed"] and len(found["growth"]) == 3
    for case in found["cases"]:
        assert {"full sdpa", "S2 sdpa", "S2 cpu", "S2 permute + varlen (original)"} & set(case["rows"])
        assert all(row["R"] > 0 for name, row in case["rows"].items() if name.startswith("S2"))


def test_blocks(tmp_path):
    with pytest.raises(SystemExit) as end:
        run("blocks.py", "--tiny", "--device", "cpu", "--json", tmp_path / "out.json")
    assert end.value.code == 0
    rows = json.loads((tmp_path / "out.json").read_text())["cases"][0]["rows"]
    assert list(rows) == ["full fastest", "s2 fastest", "adaptive sdpa"]
    assert all(row["is_right"] and row["both_ms"] > 0 for row in rows.values())


def test_blocks_says_what_is_wrong(tmp_path, capsys):
    from peft_longlora.kernels import sdpa

    right = sdpa.Sdpa.attend_blocks
    with (
        mock.patch.object(sdpa.Sdpa, "attend_blocks", lambda *args: right(*args) * 1.01),
        pytest.raises(SystemExit) as end,
    ):
        run("blocks.py", "--tiny", "--device", "cpu", "--json", tmp_path / "out.json")
    assert end.value.code == 1 and "wrong: adaptive sdpa" in capsys.readouterr().out


VARIANTS = ("--device", "cpu", "--seconds", 0.001, "--rounds", 1, "--shape", 4, 2, 16, 256, 64)


def test_variants(tmp_path):
    run("variants.py", *VARIANTS, "--kernel", "cpu", "--json", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) > 8 and all(row["both_ms"] > 0 for row in rows.values())


def test_variants_of_flash_attention_4(tmp_path, monkeypatch):
    """Its functions are computed by a formula here; block sparsity, which is a program for a GPU, is left out."""
    interface = FlashAttention4Interface()
    monkeypatch.setattr(FlashAttention4, "load", lambda self: interface)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", interface)
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: tensor)
    words = ("public", "output", "stream", "batches", "engine")
    run("variants.py", *VARIANTS, "--only", *words, "--json", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {"full attention, heads of a KV head packed into a tile", "batches, streams of falling priority"} <= set(
        rows
    )
    assert len(rows) == 17


def test_dense_forward(tmp_path):
    run("dense_forward.py", "--tiny", "--repeats", 1, "--output", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["attention"].partition(":")[0] for row in rows] == ["sdpa", "s2_attn", "fastest"]
    assert rows[1]["equals_sdpa"] and rows[2]["error"] < 0.02


def test_training(tmp_path):
    """Each row changes time and memory alone: the losses are those of the row before, but for bfloat16's rounding.

    A float8 base rounds more, and the 256 tokens that full attention sees are four groups.
    """
    rows = ("float32 low rank", "half low rank", "attention kept", "as planned", "by hand", "float8", "full attention")
    options = ("--repeats", 1, "--means", '{"keep": 1, "free": 1}', "--output", tmp_path / "out.json")
    run("training.py", "--tiny", *options, "--rows", *rows, "liger, full", "liger, full by PyTorch")
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    full = [row["losses"] for row in rows if "full" in row["row"]]
    assert full[0] == full[2] == pytest.approx(full[1], abs=0.01) and full[0] != rows[0]["losses"]
    assert all(row["seconds"] > 0 and len(row["warm_up_seconds"]) == 2 and "unfinished" not in row for row in rows)
    assert all(row["losses"] == pytest.approx(rows[0]["losses"], abs=0.05) for row in rows)


def test_a_training_run_that_is_ended_leaves_the_steps_before(tmp_path, capsys, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def ended(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", ended)
    with pytest.raises(KeyboardInterrupt):
        run("training.py", "--tiny", "--rows", "as planned", "--warm-up", 1, "--output", tmp_path / "out.json")
    (row,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert row["unfinished"] == "2 of 4 steps" and row["seconds"] > 0 and len(row["warm_up_seconds"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("step 3 of 4 begins")


def test_generation(tmp_path):
    run("generation.py", "--tiny", "--new-tokens", 3, "--caches", "dense", "whole", "--output", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["cache"], row["length"]) for row in rows] == [(c, n) for n in (200, 600) for c in ("dense", "whole")]
    assert all("error" not in row and row["kv_bytes"] > 0 for row in rows)


@pytest.fixture
def texts(tmp_path) -> Path:
    (tmp_path / "texts").mkdir()
    for name, page in (("one", "CHANGELOG.md"), ("two", "README.md")):
        (tmp_path / "texts" / f"{name}.txt").write_text((ROOT / page).read_text()[:6000])
    return tmp_path / "texts"


def test_eval_throughput(texts, capsys):
    run("eval_throughput.py", "--model", EMBEDDED, "--data", texts, "--lengths", 128, "--repeats", 1)
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 128 |")]
    assert int(row.split("|")[2]) > 10


def test_eval_memory(texts, capsys):
    for protocol in ("documents", "longlora"):
        run("eval_memory.py", "--one", "--data", texts, "--length", 128, "--protocols", protocol)
        found = json.loads(capsys.readouterr().out)
        assert found["documents"] == 2 and found["windows"] > 10 and found["speed"] > 0
        assert len(found["memory"]) == 7 and min(found["memory"]) > 0


@pytest.mark.slow
def test_eval_memory_of_invented_words():
    """In processes of its own; 16 MB in full."""
    run("eval_memory.py", "--megabytes", 16, "--protocols", "documents")


def share(folder: str, *options) -> None:
    # The group of processes is there already.
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        output = Path(folder, f"{os.environ['RANK']}.json")
        rows = [f"{attention}:256:0" for attention in ("alone", "s2", "ulysses")]  # ring: on GPUs alone
        run("scaling.py", "--tiny", "--check", "--group-size", 64, *options, "--rows", *rows, "--output", output)


SHARES = {
    "copied": (),
    "sharded": ("--sharded", "--offload"),
    "sharded, in blocks": ("--sharded", "--block", 2, "--tile", 64, "--offload"),
}


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.slow if how != "copied" else ()) for how in SHARES]
)
def test_scaling_on_two_processes(how, tmp_path):
    """The shared step has the loss and the gradients of one process that has the whole sequence and all weights."""
    run_ranks(2, share, str(tmp_path), *SHARES[how])
    found = json.loads((tmp_path / "0.json").read_text())
    assert [row["attention"] for row in found["rows"]] == ["alone", "s2", "ulysses"]
    assert found["check"]["shared_to_alone"] < 0.1
    assert max(found["check"]["shared_float32"].values()) < 1e-5
    assert found["about"]["share_of_weights"] == (1 if how == "copied" else 0.5)
    assert found["check"]["sharded"] == all(row["gib_gathered"] > 0 for row in found["rows"]) == (how != "copied")


def test_scaling_model(capsys):
    two, four = (sorted((FOLDER / "results").glob(f"scaling_{count}xh200*.json")) for count in (2, 4))
    run("scaling_model.py", *two, "--beside", *four)
    printed = capsys.readouterr().out
    assert "S2-Attn: c = " in printed and "| 4 | 2,097,152" in printed


def test_scaling_model_beside_sharded_rows(tmp_path, capsys):
    """A measured row stands beside what was predicted for it, whether it is one of the table's own cases or not."""
    about = dict(name="llama-3.3-70b", sharded=True, block=4, tile=16384, offload=False)
    row = dict(attention="s2", gpus=8, seconds=170.25, is_warm=False, peak_gib=91.75)
    rows = [dict(row, tokens=2**20), dict(row, tokens=2**19, seconds=80.5)]
    (tmp_path / "70b.json").write_text(json.dumps(dict(about=about, rows=rows)))
    run(
        "scaling_model.py",
        *sorted((FOLDER / "results").glob("scaling_2xh200*.json")),
        "--beside",
        tmp_path / "70b.json",
    )
    lines = capsys.readouterr().out.splitlines()
    [known] = [line for line in lines if line.startswith("| 8 H200 | 1,048,576 |")]
    [other] = [line for line in lines if line.startswith("| 8 | 524,288 |")]
    assert known.endswith("| 170.25 s (not warmed up) | 91.8 GiB |") and "| 80.50 s (not warmed up) |" in other


def test_tables(capsys):
    run("tables.py", FOLDER / "results/attention_h200.json", FOLDER / "results/variants_h200.json")
    assert capsys.readouterr().out.count("| --- |") >= 3
    run("tables.py", "--together", *sorted((FOLDER / "results").glob("training_7b_full_*.json")))
    printed = capsys.readouterr().out
    assert printed.count("\n| --- |") == 2 and printed.count("times as fast") == 4


def test_plot_pattern(tmp_path):
    run("plot_pattern.py", tmp_path / "pattern.png")
    assert (tmp_path / "pattern.png").read_bytes().startswith(b"\x89PNG")


def test_plot_step(tmp_path):
    """The kernels of the committed run, each counted once."""
    numbers = FOLDER / "results" / "training_32k_h100.json"
    run("plot_step.py", numbers, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    by_kind = runpy.run_path(str(FOLDER / "plot_step.py"))["by_kind"]
    for row in json.loads(numbers.read_text())["results"]:
        kinds = by_kind(row["profile"])
        assert sum(kinds.values()) == pytest.approx(sum(ms for _, ms in row["profile"]))
        assert kinds["matrix products"] > kinds["attention"] > kinds["optimiser"]


def test_passages(tmp_path, capsys):
    """A book of ten places: the answer's words are found, and those of the question alone are somewhere else."""
    pytest.importorskip("snowballstemmer")
    lines = [f"On day {i} nobody spoke of anything that mattered to them." for i in range(400)]
    lines[100] = "Cannons lie beneath a chapel."
    lines[200] = lines[250] = lines[300] = "Where did they hide the weapons? Where?"
    text = "\n".join(lines).encode()
    (tmp_path / "7.txt.gz").write_bytes(gzip.compress(text))
    asked = {"question": "Where did they hide the weapons?", "answer": "Beneath a chapel.", "lines": [[101, 101]]}
    book = {"title": "Days", "gutenberg": 7, "sha256": hashlib.sha256(text).hexdigest(), "questions": [asked]}
    (tmp_path / "questions.json").write_text(json.dumps([book]))
    common = ("--books", tmp_path, "--questions", tmp_path / "questions.json", "--tokenizer", EMBEDDED)
    run("passages.py", *common, "--output", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    ways = {"question and answer": [True], "half of the answer": [False], "wrong answer": [True]}  # of one question
    assert rows == [{"title": "Days", "questions": 1, **ways, "question alone": [False]}]
    assert "Days: question and answer 1 of 1, " in capsys.readouterr().out
    (tmp_path / "questions.json").write_text(json.dumps([{**book, "sha256": "0"}]))
    with pytest.raises(SystemExit, match=r"7\.txt\.gz is another edition"):
        run("passages.py", *common)

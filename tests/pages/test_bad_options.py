"""Bad arguments of every script: one line, code 2, and no model is loaded before it."""

import json
import re
import runpy
import sys
from unittest import mock

import pytest
import torch
import transformers

from tests.helpers.paths import EMBEDDED, ROOT

NUMBERS = ROOT / "benchmarks/results"
# Script, arguments, and a part of the message. {here} is an empty folder.
CASES = [
    ("benchmarks/attention.py", "--rounds 0", "'0' is not a number of 1 or more"),
    ("benchmarks/attention.py", "--tiny --device cpu --cases 9", "--cases 9: there are 2 cases, from 0"),
    ("benchmarks/attention.py", "--device nowhere", "'nowhere' is not a device of this machine"),
    ("benchmarks/attention.py", "--json {here}", "is a folder. Give a file"),
    ("benchmarks/blocks.py", "--seconds -1", "'-1' is not a number above 0"),
    ("benchmarks/blocks.py", "--json {here}/no/out.json", "does not exist. Make it first"),
    ("benchmarks/dense_forward.py", "--tiny --lengths 0", "'0' is not a number of 1 or more"),
    ("benchmarks/dense_forward.py", "--tiny --output {here}", "is a folder. Give a file"),
    ("benchmarks/eval_memory.py", "--one", "--one measures --data"),
    ("benchmarks/eval_memory.py", "--data {here}/none", "none"),
    ("benchmarks/eval_memory.py", "--protocols paper", "invalid choice: 'paper'"),
    ("benchmarks/eval_throughput.py", "--model {here}/none --data {here}", "no "),
    ("benchmarks/generation.py", "--tiny --new-tokens 0", "'0' is not a number of 1 or more"),
    ("benchmarks/generation.py", "--tiny --lengths 8k,many", "is not a list of numbers"),
    ("benchmarks/passages.py", "--books {here} --tokenizer {embedded}", "No such file"),
    ("benchmarks/passages.py", "--books {here} --questions {here}/x --tokenizer x", "no such file"),
    ("benchmarks/plot_pattern.py", "", "the following arguments are required: image"),
    ("benchmarks/plot_pattern.py", "{here}", "is a folder. Give a file"),
    ("benchmarks/plot_step.py", "{here}/none.json {here}/x.png", "no such file"),
    ("benchmarks/plot_step.py", "{numbers}/attention_h200.json {here}/x.png", "was not written by"),
    ("benchmarks/scaling.py", "--output {here}/x.json", "start it with torchrun"),
    ("benchmarks/scaling.py", "--output {here}/x.json --rows s3:100", "'s3:100' is not attention:tokens"),
    ("benchmarks/scaling.py", "--output {here}/x.json --shape gpt-2", "invalid choice: 'gpt-2'"),
    ("benchmarks/scaling_model.py", "{tiny}", "is of tiny. The model knows llama-3.1-8b"),
    ("benchmarks/scaling_model.py", "{numbers}/attention_h200.json", "was not written by benchmarks/scaling.py"),
    ("benchmarks/scaling_model.py", "{here}/none.json", "no such file"),
    ("benchmarks/tables.py", "{here}/none.json", "no such file"),
    ("benchmarks/tables.py", "{odd}", "none of these scripts wrote it"),
    ("benchmarks/tables.py", "--together {numbers}/attention_h200.json", "training.py did not write it"),
    ("benchmarks/training.py", "--rows magic", "invalid choice: 'magic'"),
    ("benchmarks/training.py", "--means free=1", "is not JSON with arguments of checkpoint_blocks"),
    ("benchmarks/training.py", "--tiny --output {here}/no/x.json", "does not exist. Make it first"),
    ("benchmarks/training.py", "--tiny --repeats -1", "'-1' is not a number of 1 or more"),
    ("benchmarks/variants.py", "--shape 9 2 64 1024 256", "H=9 is to be a multiple of H_kv=2"),
    ("benchmarks/variants.py", "--kernel magic", "invalid choice: 'magic'"),
    ("experiments/books.py", "--model {embedded} --texts {here} --output {here}/x", "there is no folder of this name"),
    ("experiments/books.py", "--model {here}/none --texts {texts} --output {here}/x", "--model "),
    ("experiments/report.py", "--never", "unrecognized arguments: --never"),
    ("experiments/run.py", "{here}/none.yaml --list", "none.yaml"),
    ("experiments/run.py", "experiments/schedules.yaml --device cpu", "--model is missing"),
    ("experiments/run.py", "experiments/schedules.yaml --device cpu --model {embedded}", "there is no train.npy"),
    ("experiments/run.py", "experiments/schedules.yaml --device cpu --only x --list", "--only x: no study has a cell"),
    ("examples/extend_context.py", "--model {embedded} --data {here}/none", "none"),
    ("examples/sft_longalpaca.py", "--model {embedded} --data {here}/none", "none"),
    ("examples/long_sequence.py", "--model {embedded} --data {here}/none --context-length 1024", "none"),
    ("examples/merge_and_generate.py", "--adapter {here}/none", "none"),
    ("examples/pretrain_tiny.py", "--steps 0", "'0' is not a number of 1 or more"),
    ("examples/quickstart.py", "--max-steps none", "'none' is not a number of 1 or more"),
]  # fmt: skip
# Imported by scripts, or run only without arguments.
LIBRARIES = {
    "command_line.py", "stdlib_text.py", "measure.py", "options.py", "shapes.py", "ways.py",
    "float8.py", "float8_kernel.py", "timed_steps.py", "training_model.py", "training_others.py",
    "scaling_check.py", "scaling_memory.py", "scaling_prediction.py", "scaling_step.py", "scaling_traffic.py",
    "scaling_weights.py", "cells.py", "choices.py", "course.py", "figures.py", "losses.py", "metrics.py",
    "plots.py", "records.py", "rules.py", "ruler.py",
    "train.py", "work.py",
}  # fmt: skip


@pytest.fixture
def words(tmp_path) -> dict[str, object]:
    (tmp_path / "here").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/book.txt").write_text("A book.")
    (tmp_path / "odd.json").write_text(json.dumps({"nothing": 1}))
    (tmp_path / "tiny.json").write_text(json.dumps({"about": {"name": "tiny"}, "rows": []}))
    files = dict(odd=tmp_path / "odd.json", tiny=tmp_path / "tiny.json")
    return dict(here=tmp_path / "here", texts=tmp_path / "texts", **files, numbers=NUMBERS, embedded=EMBEDDED)


@pytest.fixture
def no_model(monkeypatch):
    """Nothing is loaded, made or started before the options are checked."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the options were checked")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", refuse)
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)


def test_every_script_has_a_case():
    scripts = {
        f"{folder}/{path.name}"
        for folder in ("benchmarks", "examples", "experiments")
        for path in (ROOT / folder).glob("*.py")
        if path.name not in LIBRARIES
    }
    assert scripts <= {script for script, _, _ in CASES}


@pytest.mark.parametrize(("script", "arguments", "message"), CASES)
def test_bad_arguments_are_one_line_and_code_2(script, arguments, message, words, no_model, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)
    path = ROOT / script
    with (
        mock.patch.object(sys, "argv", [str(path), *arguments.format(**words).split()]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said and said.count("\n") == 1 and not re.search(r"^Traceback", said, re.MULTILINE)
    assert said.startswith(f"{path.name}: error: ")

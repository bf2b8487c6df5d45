"""`longlora reach` prints what `far_layers` measures, in order, and proposes layers."""

import re

import pytest
import torch
from transformers import AutoTokenizer

from peft_longlora import far_layers
from peft_longlora.attention.reach import SINKS
from peft_longlora.cli import reach
from peft_longlora.cli.main import main
from peft_longlora.eval import load_subject
from tests.helpers.paths import EMBEDDED

TEXTS = [f"def f{n}(x):\n    return x + {n}\n" * 400 for n in range(3)]


@pytest.fixture
def books(tmp_path):
    (tmp_path / "books").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    return tmp_path / "books"


def test_layers_come_in_order_with_their_figures(books, tmp_path, capsys):
    plot = tmp_path / "reach.png"
    options = ["--model", str(EMBEDDED), "--dtype", "float32", "--device", "cpu", "--data", str(books)]
    assert (
        main(
            ["reach", *options, "--length", "400", "--beyond", "100", "--rows", "3", "--top", "2", "--plot", str(plot)]
        )
        == 0
    )
    out = capsys.readouterr().out
    found = [(int(layer), float(share)) for layer, share in re.findall(r"^ +(\d+) +([\d.]+)%", out, re.MULTILINE)]
    subject = load_subject(str(EMBEDDED), dtype="float32", device="cpu")
    rows = [torch.tensor(subject.encode(text)[:400]) for text in TEXTS]
    wanted = far_layers(subject.model, rows, 100)
    assert [layer for layer, _ in found] == list(wanted)
    assert [share for _, share in found] == pytest.approx([100 * share for share in wanted.values()], abs=0.006)
    assert f"LongLoraConfig(dense_layers={sorted(list(wanted)[:2])})" in out and out.count("*") == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--length", "9000"], "no document of --data is longer"),
        (["--length", "228", "--beyond", "100"], "--length 228: no token is --beyond 100 before another one, behind"),
        (["--length", "228", "--beyond", "100"], "Give rows of 229 tokens or more."),
        (["--length", "1"], "--length 1: no token is a quarter of it before another one, behind the first 128. Give"),
        (["--length", "170"], "Give rows of 171 tokens or more."),
        (["--plot", "{books}"], "it is a folder"),
        (["--plot", "{books}/reach.jpg.foo"], "the plot is a PNG. Give a file whose name ends in .png."),
        (["--rope-type", "learned", "--context-length", "1024"], "an adapter holds: give it to LongLoraConfig."),
    ],
)
def test_bad_input_is_one_line(books, options, reason, capsys):
    common = ["reach", "--model", str(EMBEDDED), "--device", "cpu", "--data", str(books)]
    assert main([*common, *(option.format(books=books) for option in options)]) == 2
    error = capsys.readouterr().err
    assert (
        reason in error
        and ("--beyond" in error) == ("--beyond" in options)
        and error.endswith("\n")
        and "Traceback" not in error
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--length", "171", "--rows", "2"], "2 rows of 171 tokens\n"),
        (
            ["--length", "229", "--beyond", "100", "--rows", "999"],
            "{whole} rows of 229 tokens (--data holds no more than these of --rows 999)\n",
        ),
    ],
)
def test_the_number_of_rows_that_were_measured_is_said(books, options, said, capsys):
    assert main(["reach", "--model", str(EMBEDDED), "--device", "cpu", "--data", str(books), *options]) == 0
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    whole = sum(len(tokenizer(text)["input_ids"]) // 229 for text in TEXTS)
    assert capsys.readouterr().out.startswith(said.format(whole=whole))


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--length", "600"], True),
        (["--length", "512"], False),
        (["--length", "600", "--context-length", "1024"], False),
    ],
)
def test_rows_above_the_window_are_warned_of(books, options, warned, capsys):
    assert main(["reach", "--model", str(EMBEDDED), "--device", "cpu", "--data", str(books), *options]) == 0
    warning = "--length 600 is above the model's window of 512 tokens"
    assert (warning in capsys.readouterr().err) == warned


def test_the_first_tokens_are_those_of_far_layers():
    assert reach.SINKS == SINKS

"""`longlora reach` prints what `far_layers` measures, in order, and proposes layers."""

import re

import pytest
import torch

from peft_longlora import far_layers
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
        (["--length", "200", "--beyond", "100"], "Give rows of more than 228 tokens"),
        (["--plot", "{books}"], "it is a folder"),
    ],
)
def test_bad_input_is_one_line(books, options, reason, capsys):
    common = ["reach", "--model", str(EMBEDDED), "--device", "cpu", "--data", str(books)]
    assert main([*common, *(option.format(books=books) for option in options)]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.endswith("\n") and "Traceback" not in error

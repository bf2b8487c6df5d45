"""Everything by its id on the Hub: model, adapter and books, over HTTP from a hub on 127.0.0.1 (loopback_hub.py)."""

import contextlib
import io
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch

from peft_longlora.eval import Results
from tests.helpers.evaluated import save_adapter, save_base, save_texts
from tests.helpers.hub_process import answer, start_process
from tests.helpers.loopback_hub import LoopbackHub


def read_folder(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def parquet(rows: list[dict[str, str]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def run(arguments: list[str]) -> tuple[int, list[str]]:
    """`longlora` in the other process: its exit code and the lines of its errors."""
    from peft_longlora.cli import main as cli

    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(arguments)
    return code, [line for line in error.getvalue().splitlines() if "error: " in line]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> str:
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return save_texts(tmp_path_factory.mktemp("text") / "modules")


@pytest.fixture(scope="module")
def hub(base, adapter, text):
    """PG19 as it lies on the Hub (parquet files by split), one dataset as a script, and the models."""
    books = [path.read_text() for path in sorted(Path(text).iterdir())]
    test = [{"short_book_title": f"Book {i}", "text": book} for i, book in enumerate(books)]
    with LoopbackHub() as server:
        server.put("me/base", read_folder(base))
        server.put("me/adapter", read_folder(adapter))
        files = {
            "data/train-00000-of-00001.parquet": parquet(test[:1]),
            "data/test-00000-of-00001.parquet": parquet(test),
        }
        server.put("me/pg19", files, kind="dataset")
        server.put("me/proof-pile", {"proof-pile.py": b"import datasets\n"}, kind="dataset")
        lines = "".join(json.dumps({"body": book}) + "\n" for book in books).encode()
        server.put("me/lines", {"train.jsonl": lines}, kind="dataset")
        yield server
    assert not server.unknown, "calls that the loopback hub does not know"


@pytest.fixture(scope="module")
def longlora(hub, tmp_path_factory):
    process = start_process(hub, tmp_path_factory.mktemp("home"))
    yield lambda *arguments: process.submit(answer, run, [str(a) for a in arguments]).result()
    process.shutdown()


COMMON = ["--tasks", "perplexity", "--lengths", "128", "--dtype", "float32", "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split", "more"),
    [
        ("pg19", "test", ["--split", "test"]),
        ("lines", "train", ["--text-field", "body"]),
    ],
)
def test_results_are_those_of_the_same_files(longlora, tmp_path, base, adapter, text, name, split, more):
    from peft_longlora.cli import main as cli

    here = ["eval", "--model", base, "--adapter", adapter, "--data", text, *COMMON, "--output", str(tmp_path / "here")]
    assert cli.main(here) == 0
    files = Results.load(tmp_path / "here")
    there = ["eval", "--model", "me/base", "--adapter", "me/adapter", *COMMON]
    assert longlora(*there, "--data", f"me/{name}", *more, "--output", tmp_path / name) == (0, [])
    results = Results.load(tmp_path / name)
    [data], [same] = results.data.values(), files.data.values()
    assert (data["sha256"], data["documents"], data["sources"]) == (same["sha256"], 3, [f"me/{name} ({split})"])
    assert [row.value for row in results.results] == [row.value for row in files.results]
    assert (results.model["name"], results.model["adapter"]) == ("me/base", "me/adapter")


@pytest.mark.slow
def test_another_commit_of_an_adapter_or_a_base_is_another_run(longlora, hub, tmp_path, base, adapter):
    """Names on the Hub stand for whatever was pushed last; results name the commit."""
    for what, folder, weights in (
        ("adapter", adapter, "adapter_model.safetensors"),
        ("model", base, "model.safetensors"),
    ):
        repo, files = f"me/moving-{what}", read_folder(folder)
        hub.put(repo, files)
        options = {"adapter": ["--model", "me/base", "--adapter", repo], "model": ["--model", repo]}[what]
        command = ["eval", *options, *COMMON, "--data", "me/pg19", "--split", "test", "--output", tmp_path / what]
        assert longlora(*command) == longlora(*command) == (0, [])
        key = {"adapter": "adapter_sha256", "model": "fingerprint"}[what]
        assert re.fullmatch("[0-9a-f]{40}", Results.load(tmp_path / what).model[key])
        tensors = safetensors.torch.load(files[weights])
        files[weights] = safetensors.torch.save({name: 1.5 * x for name, x in tensors.items()}, {"format": "pt"})
        hub.put(repo, files)
        assert longlora(*command)[0] == 0
        before, after = (Results.load(place).model[key] for place in (tmp_path / what / "earlier-1", tmp_path / what))
        assert before != after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "me/nothing"], "me/nothing: no file or folder here, and no such dataset on the Hub"),
        (["--data", "me/pg19", "--split", "dev"], "me/pg19: .*dev.*train"),
        (["--data", "me/pg19", "--text-field", "body"], r"me/pg19 \(train\), record 1: .*'body'"),
        (["--data", "me/proof-pile"], "me/proof-pile: .*script"),
        pytest.param(["--data", "me/pg19", "--data-config", "long"], "me/pg19: .*long", marks=pytest.mark.slow),
        (
            ["--model", "me/none", "--data", "me/pg19"],
            "--model me/none: no such folder, and no such repository on the Hub",
        ),
        (["--adapter", "me/none", "--data", "me/pg19"], "--adapter me/none: no such folder, and no such repository"),
    ],
)
def test_what_is_not_there_ends_with_code_2_and_one_line(longlora, tmp_path, options, message):
    base = [] if "--model" in options else ["--model", "me/base"]
    code, lines = longlora("eval", *base, *COMMON, *options, "--output", tmp_path / "out")
    assert code == 2 and len(lines) == 1
    assert re.search(message, lines[0]), lines[0]

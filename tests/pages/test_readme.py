"""The README tells the truth: its code runs, its tables and its file map are those of the package."""

import ast
import dataclasses
import re
from collections import Counter

import datasets
import pytest
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTTrainer

from peft_longlora import LongLoraConfig
from tests.helpers.paths import EMBEDDED, ROOT
from tests.helpers.tiny_base import prose, save_base

README = (ROOT / "README.md").read_text()
FILLED_IN = {
    "base_context_length", "base_layout", "base_rope_parameters", "applied_context_length", "applied_group_size",
    "applied_rope_parameters", "vocab_size", "format_version",
}  # fmt: skip


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    """The quick start and the way back, word for word, on whole books, at a size for a test.

    Every token of every book is trained on once, as a target, except the first of each row's piece.
    """
    base = save_base(tmp_path / "base")
    (tmp_path / "books").mkdir()
    books = [prose(words, seed) for seed, words in enumerate((900, 70, 1500, 333))]
    for number, text in enumerate(books):
        (tmp_path / f"books/{number}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    seen = watch_training(monkeypatch)
    names = {}
    for block in code_blocks("python"):
        for old, new in {'"meta-llama/Llama-2-7b-hf"': repr(str(base)), "32768": "256"}.items():
            block = block.replace(old, new)
        exec(compile(block, "README.md", "exec"), names)

    tokenizer = AutoTokenizer.from_pretrained(base)
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in books]
    pieces = [tuple(ids[i : i + 256]) for ids in documents for i in range(0, len(ids), 256)]
    assert Counter(piece for piece, _ in seen) == Counter(pieces)
    assert all(targets == piece[1:] for piece, targets in seen)
    assert sum(len(targets) for _, targets in seen) == sum(map(len, documents)) - len(pieces)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", capsys.readouterr().out)]
    assert 6 < len(losses) < len(pieces)  # one a row, and two short pieces share a row
    assert all(7 < loss < 10 for loss in losses)  # a random model's loss is a bit above log(4096)
    assert names["merged"].config.rope_parameters["rope_type"] == "yarn"
    assert (tmp_path / "my-32k-model/config.json").exists()


def watch_training(monkeypatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens, targets) of each stretch of a row whose positions restart, filled in while a trainer trains."""
    seen, step = [], SFTTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        ids, labels, places = (inputs[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
        starts = [index for index, place in enumerate(places) if place == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            seen.append((tuple(ids[start:stop]), tuple(label for label in labels[start:stop] if label != -100)))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", watched)
    return seen


def test_field_table_lists_every_field_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", README, flags=re.MULTILINE))
    own = {f.name: f.default for f in dataclasses.fields(LongLoraConfig) if f.init}
    inherited = {f.name for f in dataclasses.fields(LoraConfig)}
    assert set(own) - inherited - FILLED_IN == set(rows) - inherited
    for name in set(rows) - inherited:
        assert rows[name].strip("`").replace('"', "'") == repr(own[name]).replace('"', "'"), name
    for name in FILLED_IN:
        assert f"`{name}`" in README


def test_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", README, flags=re.MULTILINE))
    named = {name for pair in named for name in pair if name}
    assert {"demo", "test"} <= named <= targets


def test_links_and_images_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_file_map_is_the_tree():
    """One line a folder: every folder of the package and of the repository, and no line for what is not there."""
    block = next(b for b in code_blocks("text") if "peft_longlora/" in b)
    paths, folder = set(), ""
    for line in filter(str.strip, block.splitlines()):
        name, *purpose = line.split(maxsplit=1)
        assert purpose, f"{name} has no purpose line"
        if not line.startswith("  "):
            folder = name if name.endswith("/") else ""
        path = folder + name if line.startswith("  ") else name
        assert (ROOT / path).exists(), path
        paths.add(path)
    package = ROOT / "peft_longlora"
    rooms = {f"peft_longlora/{init.parent.name}/" for init in package.glob("*/__init__.py")}
    files = {f"peft_longlora/{path.name}" for path in package.glob("*.py")}
    others = {"benchmarks/", "docs/", "examples/", "model_cards/", "tests/"}
    assert rooms | files | others <= paths, (rooms | files | others) - paths


def test_every_room_says_what_it_is_for():
    """The map has one line a folder; the folder's own paragraph carries the rest."""
    inits = list((ROOT / "peft_longlora").rglob("*/__init__.py"))
    assert len(inits) > 8
    for init in inits:
        assert (ast.get_docstring(ast.parse(init.read_text())) or "").strip(), init


def test_every_example_is_listed():
    listed = (ROOT / "examples/README.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f"`{path.name}`" in listed, path.name


@pytest.mark.parametrize("word", ["TODO", "FIXME", "@@"])
def test_nothing_is_left_open(word):
    assert word not in README


@pytest.mark.parametrize(("page", "window"), [("README.md", 4096), ("docs/tutorial.md", 2048)])
def test_the_chats_examples_fit_their_windows(page, window):
    """With the answer, in tokens of the embedded model, whose window `make demo` and the tutorial extend so far."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    files = re.findall(r"^longlora chat .*--file (docs/\S+)", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert files
    for file in files:
        assert len(tokenizer((ROOT / file).read_text(), verbose=False)["input_ids"]) + 256 + 50 < window

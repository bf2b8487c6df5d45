"""The README tells the truth: its code runs, its tables and its file map are those of the package."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from peft import LoraConfig

from peft_longlora import LongLoraConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FILLED_IN = {
    "base_context_length", "applied_context_length", "applied_group_size", "applied_rope_parameters", "vocab_size",
    "format_version",
}  # fmt: skip


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    """The quick start and the way back, word for word, at a size for a test."""
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    shrink = {
        '"meta-llama/Llama-2-7b-hf"': repr(str(ROOT / "examples/assets/stdlib-llama-512")),
        "32768": "1024",
        "packing=True,": "packing=True, max_steps=1, report_to='none', use_cpu=True,",
    }
    names = {"dataset": Dataset.from_dict({"text": ["def f(x):\n    return x\n" * 40] * 8})}
    for block in code_blocks("python"):
        for old, new in shrink.items():
            block = block.replace(old, new)
        exec(compile(block, "README.md", "exec"), names)
    assert names["merged"].config.rope_parameters["rope_type"] == "yarn"
    assert (tmp_path / "my-32k-model/config.json").exists()


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


def test_architecture_table_says_what_the_test_found():
    """docs/architectures.md is made from running models; each of its rows stands in the right row here."""
    found = re.findall(
        r"^\| (\w+)( \([^)]*\))? \|[^|]*\| (\w+)", (ROOT / "docs/architectures.md").read_text(), re.MULTILINE
    )
    rows = [line for line in README.splitlines() if line.startswith("| ") and "`" in line]
    assert len(found) > 40
    for name, variant, result in found:
        if not variant and name != "architecture":
            assert any(
                line.startswith(f"| {result}") or f", {result}" in line for line in rows if f"`{name}`" in line
            ), name


@pytest.mark.parametrize("word", ["TODO", "FIXME", "@@"])
def test_nothing_is_left_open(word):
    assert word not in README

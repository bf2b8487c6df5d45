"""A tiny base, texts, records and a recipe in one folder, and the command that trains as it says."""

import json

import datasets
import pytest
import yaml

from peft_longlora.cli.main import main
from tests.helpers.options import with_usual
from tests.helpers.tiny_base import prose, save_base


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_base(folder / "base")
    (folder / "books").mkdir()
    for seed, count in enumerate((300, 200)):
        (folder / f"books/{seed}.txt").write_text(prose(count, seed))
    (folder / "held.txt").write_text(prose(300, 9))
    records = [{"instruction": "Say it.", "input": prose(40, n), "output": prose(6, n)} for n in range(6)]
    for name, part in (("records", records[:4]), ("answers", records[4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    recipe = dict(model=str(folder / "base"), data=str(folder / "books"), context_length=128, max_steps=4)
    recipe |= dict(r=4, learning_rate=1e-2)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def run(place, tmp_path, monkeypatch, capsys, no_plots):
    """Run the command in this process; returns its exit code, what it printed, and its output folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "cache"))

    def run(*more, out="out"):
        code = main(["train", str(place / "recipe.yaml"), *with_usual({"--output-dir": tmp_path / out}, more)])
        said = capsys.readouterr()
        return code, said.out, said.err, tmp_path / out

    return run

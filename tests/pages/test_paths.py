"""Every file that a page names is there: pages outlive moves only if somebody checks."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = "benchmarks|docs|examples|experiments|model_cards|peft_longlora|tests"
PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*-]*[\w*/]")
FILE = re.compile(r"`((?:[a-z_]+/)*\w+\.py)`")
FOREIGN = {"eval.py"}  # the original project's
FILES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.py")]
WRITTEN = {"experiments/results"}  # by the first run of an experiment
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "examples", "examples/assets", "model_cards", "benchmarks", "experiments")
    for path in (ROOT / folder).glob("*.md")
    if path.name != "CHANGELOG.md"  # it tells of files as they were
)


def test_there_are_pages():
    assert {"README.md", "docs/attention.md", "examples/README.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_paths_named_in_the_text_exist(page):
    found = PATH.findall((ROOT / page).read_text())
    missing = [path for path in found if path not in WRITTEN and not any(ROOT.glob(path.rstrip("/")))]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_scripts_named_without_their_folder_exist(page):
    """Such as `mask.py` or `attention/mask.py`: the end of a path."""
    named = set(FILE.findall((ROOT / page).read_text())) - FOREIGN
    assert not {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in FILES)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    folder = (ROOT / page).parent
    found = [(folder / target).resolve() for target in LINK.findall((ROOT / page).read_text())]
    missing = [path for path in found if not path.exists() and path.relative_to(ROOT).as_posix() not in WRITTEN]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_names_imported_in_the_text_exist_where_users_look(page):
    """In a room's own list of names, and no deeper."""
    for module, names in re.findall(r"^from (peft_longlora[\w.]*) import ([\w, ]+)", (ROOT / page).read_text(), re.M):
        assert module.count(".") <= 1, f"{page}: {module} is no public path"
        public = importlib.import_module(module).__all__
        assert not [name for name in names.replace(" ", "").split(",") if name not in public]

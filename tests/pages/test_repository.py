"""The files of a public repository agree: one address, one version, one list of Pythons, actions pinned to commits."""

import re

import pytest
import yaml

from peft_longlora import __version__
from tests.helpers.paths import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text()
SOURCE = re.search(r'^Source = "(https://github.com/([\w-]+/[\w-]+))"$', PROJECT, re.MULTILINE)
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FILES = sorted(
    path
    for pattern in ("*.md", "*.toml", "*.cff", ".github/**/*.yml", "docs/**/*", "notebooks/*.ipynb")
    for path in ROOT.glob(pattern)
    if path.suffix in {".md", ".toml", ".cff", ".yml", ".py", ".ipynb"}
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_repositorys_address_is_that_of_the_package(path):
    """An address that ends with our name is ours, whatever it stands in; examples such as me/NAME have no host."""
    found = re.findall(r"(?:github\.com|githubusercontent\.com|/github)/([\w.-]+/peft-longlora)\b", path.read_text())
    assert set(found) <= {SOURCE[2]}


def test_the_address_stands_where_people_look():
    for name in ("README.md", "CITATION.cff", "SECURITY.md", ".github/ISSUE_TEMPLATE/config.yml"):
        assert SOURCE[2] in (ROOT / name).read_text(), name


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["repository-code"] == SOURCE[1]
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2309.12307"


def load(path):
    loaded = yaml.safe_load(path.read_text())
    return loaded | {"on": loaded.pop(True)}  # YAML 1.1 reads the key `on` as true


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_pinned_limited_and_call_what_exists(path):
    text, workflow = path.read_text(), load(path)
    uses = re.findall(r"uses: (\S+)(.*)", text)
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name) for name, _ in uses)
    assert all(re.fullmatch(r" # v\d+\.\d+\.\d+", comment) for _, comment in uses)
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= targets
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 180 and job["runs-on"] == "ubuntu-latest"


def test_one_action_has_one_commit_everywhere():
    pins = {}
    for path in WORKFLOWS:
        for name, commit in re.findall(r"uses: ([\w-]+/[\w-]+)@(\w+)", path.read_text()):
            pins.setdefault(name, set()).add(commit)
    assert len(pins) >= 6 and all(len(commits) == 1 for commits in pins.values())


def test_the_pythons_that_are_tested_are_those_that_are_promised():
    promised = re.findall(r"Python :: (3\.\d+)", PROJECT)
    tested = load(ROOT / ".github/workflows/tests.yml")["jobs"]["newest"]["strategy"]["matrix"]["python"]
    assert tested == promised == ["3.10", "3.11", "3.12", "3.13"]
    assert f'requires-python = ">={promised[0]}"' in PROJECT
    assert f'target-version = "py{promised[0].replace(".", "")}"' in PROJECT  # ruff refuses newer syntax


def test_only_the_job_that_publishes_may_speak_for_the_repository():
    jobs = load(ROOT / ".github/workflows/release.yml")["jobs"]
    assert "permissions" not in jobs["build"] and jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["environment"] == "pypi" and "password" not in str(jobs)


def test_the_hooks_of_a_commit_run_the_ruff_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    wanted = re.search(r'"(ruff==[\d.]+)"', PROJECT)[1]
    assert [hook["additional_dependencies"] for hook in hooks] == [[wanted]] * 2
    assert [hook["entry"].split()[1] for hook in hooks] == ["format", "check"]
    assert f"{wanted}\n" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_ask_for_what_exists(path):
    form = yaml.safe_load(path.read_text())
    if path.stem != "config":
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids)) and form["name"] and form["description"]
    for named in re.findall(r"\b(?:examples|docs)/[\w./-]*\w", path.read_text()):
        assert (ROOT / named).exists(), named

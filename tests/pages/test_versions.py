"""What pyproject.toml allows begins with the versions of `make test-lowest` and holds those of `make test`."""

import re

import pytest
from packaging.requirements import Requirement

from tests.helpers.paths import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text()
# Tools of the tests themselves, and packages that no CPU or no test of both files needs.
FREE = {"build", "hypothesis", "pytest", "pytest-xdist", "ruff", "matplotlib", "tensorboard", "selenium", "gradio"}
# What PEFT's own tests import, which are run with the newest versions alone.
FREE |= {"diffusers", "parameterized", "scipy"}
# What makes the site, runs the notebook and checks the wheel.
FREE |= {"ipykernel", "mkdocstrings", "nbclient", "twine", "zensical"}
FREE |= {"bitsandbytes", "deepspeed", "hqq", "lm-eval", "rouge-score", "flash-attn-4", "packaging", "torch", "jinja2"}


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {r.name.lower().replace("_", "-"): str(r.specifier).removeprefix("==") for r in found}


def required() -> dict[str, Requirement]:
    block = PROJECT[PROJECT.index("\ndependencies = [") : PROJECT.index("\n[project.scripts]")]
    found = [Requirement(text) for text in re.findall(r'"([^"]+)"', block) if not text.startswith("peft-longlora")]
    return {r.name.lower().replace("_", "-"): r for r in found}


@pytest.mark.parametrize("name", sorted(set(required()) - FREE))
def test_the_lowest_version_is_the_one_that_is_tested(name):
    lowest = next(part.version for part in required()[name].specifier if part.operator == ">=")
    tested = pinned("constraints-lowest.txt")[name]
    assert tested == lowest or tested.startswith(f"{lowest}.")


@pytest.mark.parametrize("name", sorted(required()))
def test_the_newest_version_is_allowed(name):
    newest = pinned("constraints.txt").get(name)
    assert newest is None or required()[name].specifier.contains(newest, prereleases=True)

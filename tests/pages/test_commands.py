"""Every command that a page shows can be typed: the program, its options, make's targets, pip's extras, pytest's files.

Options are compared with the parser of `longlora` and with the sources of the scripts. test_tutorial.py runs commands.
"""

import argparse
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from peft_longlora.cli.main import make_parser
from tests.helpers.paths import ROOT
from tests.pages.test_paths import PAGES

OPTION = re.compile(r"(--[a-z][\w-]*)")
INLINE = re.compile(r"(?<!`)`((?:longlora|python|accelerate|make|pip|pytest|torchrun)\s[^`]+)`")


def commands(text: str) -> list[str]:
    """The command lines in a page's blocks and sentences, continued lines joined."""
    parts = re.split(r"^```(.*)\n", text, flags=re.MULTILINE)  # prose, language, block, "", prose, ...
    blocks = [block for language, block in zip(parts[1::4], parts[2::4], strict=True) if language in ("", "bash", "sh")]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [*lines, *(" ".join(found.split()) for found in INLINE.findall("\n".join(parts[::4])))]


COMMANDS = sorted({command for page in PAGES for command in commands((ROOT / page).read_text())})


def starting(*programs: str) -> list[str]:
    """Those that call one of the programs, from the program on; environment variables before it are left out."""
    pattern = re.compile(rf"^(?:[A-Z_0-9]+=\S+ )*((?:{'|'.join(map(re.escape, programs))})\b.*)")
    return [match[1] for command in COMMANDS if (match := pattern.match(command.strip()))]


@cache
def options_of_longlora() -> dict[str, set[str]]:
    parser = make_parser()
    [subparsers] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    found = {name: set(one._option_string_actions) for name, one in subparsers.choices.items()}
    return {"": set(parser._option_string_actions)} | found


@cache
def options_of_script(path: str) -> set[str]:
    return set(re.findall(r'"(--[\w-]+)"', (ROOT / path).read_text())) | {"--help"}


def test_there_are_commands():
    assert len(starting("longlora")) > 10 and len(starting("python")) > 10 and len(starting("make")) > 5


@pytest.mark.parametrize("command", starting("longlora", "python -m peft_longlora"))
def test_longlora_has_the_command_and_its_options(command):
    rest = command.removeprefix("python -m peft_longlora").removeprefix("longlora").strip().partition("#")[0]
    name, known = re.match(r"[a-z]*", rest)[0], options_of_longlora()
    assert name in known, command
    unknown = set(OPTION.findall(re.sub(r"'[^']*'|\"[^\"]*\"", "", rest))) - known[name]
    if name == "train":  # its other options are the keys of a recipe
        unknown = set()
    assert not unknown, command


@pytest.mark.parametrize("command", [c for c in starting("python", "accelerate launch", "torchrun") if ".py" in c])
def test_scripts_and_their_options_exist(command):
    script = re.search(r"\S+\.py", command)[0]
    assert (ROOT / script).is_file()
    said = command.partition(script)[2].partition("#")[0]
    assert set(OPTION.findall(said)) <= options_of_script(script), command


@pytest.mark.parametrize("command", starting("make"))
def test_make_has_the_targets(command):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    words = shlex.split(command.partition("#")[0])[1:]
    assert words and {word for word in words if "=" not in word} <= targets


@pytest.mark.parametrize("command", [c for c in starting("pip", "python -m pip") if "peft-longlora" in c or ".[" in c])
def test_extras_exist(command):
    block = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", block, re.MULTILINE))
    named = {name for group in re.findall(r"\[([\w,-]+)\]", command) for name in group.split(",")}
    assert named <= extras


@pytest.mark.parametrize("command", starting("pytest", "python -m pytest"))
def test_tests_that_pages_name_exist(command):
    for path in re.findall(r"\btests/[\w/.]+", command):
        assert Path(ROOT, path).exists(), path


def test_runs_of_studies_name_the_model_and_the_tokens():
    runs = [command for command in starting("python") if "experiments/run.py" in command and "--list" not in command]
    assert len(runs) > 2
    for command in runs:  # run.py refuses to train without
        assert {"--model", "--tokens"} <= set(OPTION.findall(command)), command

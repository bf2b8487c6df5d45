"""CONTRIBUTING.md: its table of rooms is the one that imports are held to, and its commands exist."""

import re

from tests.helpers.paths import ROOT
from tests.whole.test_rooms import ARROWS

PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_table_of_rooms_is_the_one_that_imports_are_held_to():
    rows = re.findall(r"^\| `([\w./]+)` \|[^|]+\| ([^|]+) \|$", PAGE, re.MULTILINE)
    found = {name.removesuffix("/").removesuffix(".py"): set(re.findall(r"`([\w.]+)`", cell)) for name, cell in rows}
    assert found == {name: arrows - {"__init__"} for name, arrows in ARROWS.items() if not name.startswith("__")}


def test_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", PAGE, flags=re.MULTILINE))
    assert {"test", "lint", "demo"} <= {name for pair in named for name in pair if name} <= targets

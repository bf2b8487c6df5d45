"""Imports point one way, and importing the package is cheap."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import peft_longlora

PACKAGE = Path(peft_longlora.__file__).parent
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
# Files that must stay readable, and testable, without the rest of the package.
FOUNDATIONS = {
    "reference": set(),
    "groups": set(),
    "window": set(),
    "layers": set(),
    "calls": {"layers"},
    "rotary": {"layers", "window"},
    "rope": {"rotary", "settings", "window"},
    "sdpa": {"groups"},
    "mask": {"groups"},
    "settings": {"backends", "calls", "kernels", "layers", "rotary", "window"},
    "neighbours": {"groups"},
    "interface": set(),
    "flash": {"interface"},
    "aten": {"flash", "interface"},
    "stretch": {"data", "groups", "neighbours"},
    "sequence": {"data", "neighbours", "rotary", "settings", "stretch"},
    "trainable": {"layers"},
    "rows": set(),
    "data": {"rows"},
    "document": set(),
    "kvcache": {"window"},
    "dialogue": {"document"},
    "passages": {"dialogue", "kvcache", "settings"},
}
OPTIONAL = ("trl", "datasets", "flash_attn", "bitsandbytes", "matplotlib", "gradio", "accelerate", "pypdf")


def statements(nodes, lazily: bool):
    """All statements that run: on import alone, or also those inside functions; not what only type checkers read."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse, lazily)
            continue
        yield node
        if lazily or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from statements(ast.iter_child_nodes(node), lazily)


@cache
def imports(name: str, lazily: bool = True) -> set[str]:
    """Full names of the modules that a file of the package imports."""
    found = set()
    for node in statements(ast.parse(FILES[name].read_text()).body, lazily):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def neighbours(name: str) -> set[str]:
    """The files of the package that a file imports, lazily or not."""
    inner = {full.removeprefix("peft_longlora.") for full in imports(name) if full.startswith("peft_longlora.")}
    return {file for file in inner if file in FILES}


def test_there_is_no_cycle():
    graph = {name: neighbours(name) for name in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_foundations_import_only_what_lies_below(name):
    assert neighbours(name) <= FOUNDATIONS[name]


@pytest.mark.parametrize("name", ["reference", "groups"])
def test_truth_and_arithmetic_need_torch_alone(name):
    allowed = {"torch", "__future__", "dataclasses", "itertools", "typing", "collections"}
    assert {full.partition(".")[0] for full in imports(name)} <= allowed


def test_top_and_bottom_of_the_layers():
    users = {name: {other for other in FILES if name in neighbours(other)} for name in FILES}
    assert users["register"] == {"__init__"}
    assert users["reference"] == set(), "the definition of correct is for tests and readers"
    assert users["model"] <= {"__init__", "register", "hub"}
    assert "__init__" not in set().union(*(imports(name) for name in FILES))
    assert not [name for name in FILES if name != "__init__" and "peft_longlora" in _plain_imports(name)]


def _plain_imports(name: str) -> set[str]:
    tree = ast.parse(FILES[name].read_text())
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_only_register_touches_the_registries():
    registering = [name for name, path in FILES.items() if ".register(" in path.read_text().replace("atexit.", "")]
    assert registering == ["register"]


def test_extras_are_imported_by_no_file_on_import():
    loaded = {name: imports(name, lazily=False) for name in FILES if not name.startswith("eval")}
    wrong = {n: sorted(f for f in found if f.partition(".")[0] in OPTIONAL) for n, found in loaded.items()}
    assert not {name: found for name, found in wrong.items() if found}


def test_the_data_path_names_files_that_exist():
    """The first thing a reader sees, in `help(peft_longlora)`."""
    named = {word.strip("(),;") for word in peft_longlora.__doc__.split() if word.strip("(),;").endswith(".py")}
    assert named and {name.removesuffix(".py") for name in named} <= FILES.keys()
    assert {"mask.py", "attention.py", "groups.py", "kernels.py", "model.py"} <= named


def test_public_names():
    """The contract's section 2; every name says what it is."""
    promised = {
        "LongLoraConfig",
        "LongLoraModel",
        "s2_attention",
        "configure_attention",
        "use_attention",
        "scale_rope",
        "restore_rope",
    }
    assert promised <= set(peft_longlora.__all__)
    assert all(getattr(peft_longlora, name).__doc__ for name in peft_longlora.__all__)
    assert (PACKAGE / "py.typed").is_file()

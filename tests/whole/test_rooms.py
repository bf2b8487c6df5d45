"""The rooms of the package: which may import which, that nothing goes in a circle, and that files stay readable."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

import peft_longlora
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "peft_longlora"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
# A row a folder, or a file at the top: what it may import of the package. Files of a folder may import each other.
ARROWS = {
    "reference": set(),
    "architecture": set(),
    "data": set(),
    "kernels": set(),
    "few_tokens": {"architecture"},
    "rope": {"few_tokens", "architecture"},
    "memory": {"attention", "rope.mixing", "architecture"},
    "attention": {"kernels", "rope", "few_tokens", "architecture"},
    "sequence": {"attention", "kernels", "data", "architecture"},
    "adapter": {"attention", "rope", "kernels.patterns", "few_tokens", "architecture"},
    "hub": {"adapter", "rope", "architecture"},
    "eval": {"hub", "sequence", "attention", "rope", "data", "architecture"},
    "chat": {"hub", "rope", "data", "architecture"},
    "app": {"chat", "hub"},
    "register": {"hub", "adapter", "attention"},
    "training": {"eval", "hub", "data", "memory", "sequence", "adapter", "attention"},
    "cli": {"training", "eval", "chat", "app", "hub", "memory", "__init__"},
    "__main__": {"cli"},
    "__init__": {"register", "hub", "adapter", "attention", "rope", "kernels"},
}
# Imports inside functions. Of this package: a command's parser answers --help without what the command runs, and
# matplotlib is an extra. Of others: extras, and what costs seconds or is not everywhere.
LATE = {
    "cli": {"training", "eval", "chat", "app", "hub", "memory", "__init__"},
    "eval.report.tables": {"eval.report.plots"},
    "eval.report.side_by_side": {"eval.report.style"},
}
EXTRAS = {"accelerate", "bitsandbytes", "bm25s", "datasets", "flash_attn", "gradio", "lm_eval", "matplotlib"}
EXTRAS |= {"pyarrow", "pypdf", "rouge_score", "shtab", "snowballstemmer", "trl"}
LATE_OTHERS = EXTRAS | {
    "kernels",  # of Hugging Face, for FlashAttention 3
    "msvcrt",  # on Windows alone
    "readline",  # not on Windows
    "resource",  # not on Windows
    "torch.distributed.tensor",  # where torch was built without it, everything else works
    "torch.nn.attention.flex_attention",  # brings the compiler
    "transformers.integrations.hub_kernels",
    "transformers.modeling_flash_attention_utils",
}


@dataclass(frozen=True)
class Import:
    module: str  # the full name of what is imported, down to the file if it is one of the package
    late: bool  # inside a function

    @property
    def inner(self) -> str | None:
        """The file of the package, as FILES has it."""
        top, _, rest = self.module.partition(".")
        if top != "peft_longlora":
            return None
        names = rest.split(".") if rest else []
        while names and ".".join(names) not in FILES and ".".join([*names, "__init__"]) not in FILES:
            names.pop()
        name = ".".join(names)
        return name if name in FILES else ".".join([*names, "__init__"])


def _statements(nodes, late: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All statements that run, and whether in a function; not what only type checkers read."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _statements(node.orelse, late)
            continue
        yield node, late
        inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _statements(ast.iter_child_nodes(node), inside)


@cache
def imports(name: str) -> frozenset[Import]:
    found = set()
    for node, late in _statements(ast.parse(FILES[name].read_text()).body):
        if isinstance(node, ast.Import):
            found |= {Import(alias.name, late) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # The console script loads cli by itself, without the package's own __init__ (longlora_command.py).
            assert node.level == 0 or (node.level == 1 and room_of(name) == "cli"), f"{name} imports relatively"
            module = ".".join(filter(None, ["peft_longlora.cli" if node.level else "", node.module]))
            found |= {Import(f"{module}.{alias.name}", late) for alias in node.names}
    return frozenset(found)


def room_of(file: str) -> str:
    return file.partition(".")[0]


def is_in(file: str, places: set[str]) -> bool:
    return any(file == place or file.startswith(f"{place}.") for place in places)


def arrows_of(room: str) -> dict[str, set[str]]:
    """The files of other rooms that a room imports, each with the files that import it."""
    found: dict[str, set[str]] = {}
    for file in FILES:
        if room_of(file) == room:
            for target in {each.inner for each in imports(file)} - {None}:
                if room_of(target) != room:
                    found.setdefault(target, set()).add(file)
    return found


def test_every_room_has_a_row():
    assert {room_of(file) for file in FILES} == set(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_what_its_row_allows(room):
    wrong = {to: sorted(by) for to, by in arrows_of(room).items() if not is_in(to, ARROWS[room])}
    assert not wrong


def check_order(graph: dict[str, set[str]]) -> None:
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' <- '.join(error.args[1])}")


def test_nothing_goes_in_a_circle():
    """Neither rooms nor files, whether they import at the top or inside a function."""
    check_order({room: {room_of(target) for target in targets} for room, targets in ARROWS.items()})
    check_order({file: {each.inner for each in imports(file)} - {None, file} for file in FILES})


def test_imports_inside_functions_have_a_reason():
    """None is there to dodge a circle."""
    wrong = set()
    for file in FILES:
        inner = set().union(*(LATE[place] for place in LATE if is_in(file, {place})))
        for each in imports(file):
            if each.late and not (is_in(each.inner, inner) if each.inner else is_in(each.module, LATE_OTHERS)):
                wrong.add((file, each.inner or each.module))
    assert not wrong


def test_extras_are_imported_by_no_file_at_its_top():
    top = {file: {each.module for each in imports(file) if not each.late} for file in FILES}
    allowed = {"eval.report.plots": {"matplotlib"}, "eval.report.style": {"matplotlib"}, "app.serve": {"gradio"}}
    wrong = {
        file: sorted(m for m in found if is_in(m, EXTRAS - allowed.get(file, set()))) for file, found in top.items()
    }
    assert not {file: found for file, found in wrong.items() if found}


@pytest.mark.parametrize("place", ["reference", "kernels"])
def test_the_ground_needs_torch_alone(place):
    """The definition and the arithmetic; of the kernels, none but backends and flash know transformers."""
    known = {"torch", "peft_longlora"} | sys.stdlib_module_names
    for file in FILES:
        if is_in(file, {place}):
            found = {each.module.partition(".")[0] for each in imports(file)} - known
            more = {"transformers", "kernels"} if file in ("kernels.backends", "kernels.flash") else set()
            assert found <= more, file


def test_top_and_bottom():
    users = {file: {other for other in FILES if file in {each.inner for each in imports(other)}} for file in FILES}
    assert users["register"] == {"__init__"}
    assert users["reference"] == set(), "the definition of correct is for tests and readers"
    commands = {other for file in FILES if room_of(file) == "cli" for other in users[file] if room_of(other) != "cli"}
    assert commands == {"__main__"}


def test_only_register_touches_the_registries():
    """Of transformers and PEFT; argparse's `self.register` names an action of one parser."""
    others = re.compile(r"(?<!atexit)(?<!self)\.register\(")
    registering = [name for name, path in FILES.items() if others.search(path.read_text())]
    assert registering == ["register"]


# -- what a reader finds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "most"), [("peft_longlora", 300), ("tests", 500)])
def test_files_are_short(folder, most):
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > most}


@pytest.mark.parametrize("room", sorted({room_of(file) for file in FILES if "." in file} - {"cli"}))
def test_a_room_opens_with_its_public_names(room):
    """A paragraph on what it is for, and the names that users import from it, each with its docstring."""
    module = importlib.import_module(f"peft_longlora.{room}")
    assert len(module.__doc__.split()) >= 10
    assert module.__all__ == sorted(module.__all__) and len(module.__all__) > 0
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__doc__ and not name.startswith("_"), name


@pytest.mark.parametrize("folder", sorted({file.rpartition(".")[0] for file in FILES if "." in file}))
def test_the_paragraph_of_a_folder_names_its_files(folder):
    said = ast.get_docstring(ast.parse(FILES[f"{folder}.__init__"].read_text()))
    files = {file.rpartition(".")[2] for file in FILES if file.rpartition(".")[0] == folder}
    files -= {"__init__", "__main__"}
    assert not {name for name in files if not re.search(rf"\b{name}(\.py\b|`| {{3}})", said)}


def test_the_data_path_names_files_that_exist():
    """The first thing a reader sees, in `help(peft_longlora)`."""
    named = {word.strip("(),;:") for word in peft_longlora.__doc__.split() if word.strip("(),;:").endswith(".py")}
    assert {name for name in named if not (PACKAGE / name).is_file()} == set()
    reading = {
        "attention/mask.py",
        "attention/forward.py",
        "kernels/groups.py",
        "kernels/attend.py",
        "adapter/model.py",
    }
    assert reading <= named


def test_public_names():
    """The names that a user imports from the top; every name says what it is."""
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

"""Public names say what they take: the Args of a docstring are the parameters, one entry each, as editors and the site
show them."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap

import pytest
from peft import LoraConfig

from peft_longlora import LongLoraConfig
from tests.helpers.paths import ROOT

ROOMS = ["peft_longlora", "peft_longlora.reference"]
ROOMS += sorted(f"peft_longlora.{init.parent.name}" for init in (ROOT / "peft_longlora").glob("*/__init__.py"))
ENTRY = re.compile(r"^    \*{0,2}(\w+)(?: \([^)]*\))?: \S", re.MULTILINE)


def public() -> dict[str, object]:
    """Each public object once, under the name at which a user finds it."""
    found, seen = {}, set()
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", ["s2_attention_reference"] if room.endswith("reference") else []):
            value = getattr(module, name)
            if callable(value) and id(value) not in seen:
                seen.add(id(value))
                found[f"{room}.{name}"] = value
    return found


PUBLIC = public()


def sections(value) -> dict[str, str]:
    """The sections of a docstring in Google's style, by their heads."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises|Source|Examples?):", inspect.getdoc(value), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parameters(value) -> tuple[set[str], set[str]]:
    """Those that must have an entry, and those that may: a dataclass leaves what it inherits to its parent."""
    every = {name for name in inspect.signature(value).parameters if not name.startswith("_")} - {"self"}
    own = every & set(inspect.get_annotations(value)) if dataclasses.is_dataclass(value) else every
    if value.__module__.startswith("peft_longlora.eval.tasks"):
        own -= {"name", "notes", "protocol"}  # fields of every task of eval (tasks/task.py)
    return own, every


def is_tuner(value) -> bool:
    """PEFT constructs its tuners, users do not."""
    return value.__name__ == "LongLoraModel"


def test_there_are_public_names():
    assert len(PUBLIC) > 40 and {"peft_longlora.LongLoraConfig", "peft_longlora.eval.evaluate"} <= set(PUBLIC)


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if not is_tuner(value)])
def test_every_parameter_has_an_entry_and_every_entry_is_a_parameter(name):
    value = PUBLIC[name]
    found = sections(value)
    if inspect.isclass(value) and "Args" not in found and not dataclasses.is_dataclass(value):
        found |= sections(value.__init__)
    described = ENTRY.findall(found.get("Args", ""))
    if dataclasses.is_dataclass(value):  # one that is made for users describes its fields as attributes
        described += ENTRY.findall(found.get("Attributes", ""))
    assert len(described) == len(set(described))
    own, every = parameters(value)
    assert own <= set(described) <= every


def test_the_docstring_of_the_config_says_what_its_fields_say():
    """Editors show the docstring, `transformers` and TRL's parsers show the help of the fields."""
    entries = re.split(r"^    (\w+): ", sections(LongLoraConfig)["Args"], flags=re.MULTILINE)[1:]
    said = {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}
    inherited = {field.name for field in dataclasses.fields(LoraConfig)}
    fields = [f for f in dataclasses.fields(LongLoraConfig) if f.init and f.name not in inherited]
    assert said == {field.name: field.metadata["help"] for field in fields}
    assert list(said) == [field.name for field in fields]


@pytest.mark.parametrize("name", PUBLIC)
def test_what_a_function_raises_itself_is_said(name):
    value = PUBLIC[name]
    if inspect.isfunction(value):
        [function] = ast.parse(textwrap.dedent(inspect.getsource(value))).body
        raises = any(isinstance(node, ast.Raise) and node.exc for node in ast.walk(function))
        assert not raises or "Raises" in sections(value)
        returns = any(isinstance(node, ast.Return) and node.value for node in ast.walk(function))
        assert not returns or {"Returns", "Yields"} & set(sections(value)) or _says_what_it_returns(value)


def _says_what_it_returns(value) -> bool:
    """Such as "The documents, one by one." or "Read a file as a `Document`."."""
    first = inspect.getdoc(value).partition("\n\n")[0]
    return bool(re.match(r"(The|A|An|This|What|Whether|How|Load|Read) ", first)) or "eturn" in first


def test_a_section_begins_on_the_line_after_its_head():
    """Or is one line. The site's reader takes the second line of anything else for an entry without a name."""
    found = []
    for path in (ROOT / "peft_longlora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                found += [
                    (path.name, *match) for match in re.findall(r"^(Args|Returns|Raises): .+\n +(\S+)", text, re.M)
                ]
    assert not found

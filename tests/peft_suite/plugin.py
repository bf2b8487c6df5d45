"""The pytest plugin with which PEFT's own tests run: `LoraConfig` is `LongLoraConfig`, and failures are on a list.

Loaded with `-p plugin` in a process of its own (test_peft_suite.py) that works in PEFT's source distribution.
`--profile` says what stands for `LoraConfig`. Tests that build no such config are left out. A test on the list
(expected.yaml) is marked as a strict xfail with the error it must raise, so that the run fails if the test passes, or
fails with another error.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import CodeType
from typing import Any

import peft
import pytest
import rotary_opt
import torch
import yaml
from packaging.requirements import Requirement
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

EXPECTED = Path(__file__).with_name("expected.yaml")
NAME = "LoraConfig"

# What stands for LoraConfig: itself, for the control; else LongLoraConfig with these defaults. The models here have a
# window of 64 tokens and the rows hold eight: a longer window and small groups put scaled RoPE and S2-Attn to work.
_AT_WORK = {"context_length": 128, "group_size": 2}
PROFILES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "lora": {**_AT_WORK, "train_embeddings": False, "train_norms": False},
    "whole": _AT_WORK,
}

# PEFT's asserts in there have no message; rewritten, they say what they compared.
pytest.register_assert_rewrite("tests.testing_common")


@dataclasses.dataclass(frozen=True)
class Expectation:
    """Tests that must fail: an entry of expected.yaml, which says what the fields mean."""

    reason: str
    profiles: list[str]
    error: str
    tests: list[str]
    versions: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, profile: str) -> list[Expectation]:
        """The entries that hold for a profile and the versions installed."""
        entries = [cls(**entry) for entry in yaml.safe_load(EXPECTED.read_text(encoding="utf-8"))]
        return [entry for entry in entries if profile in entry.profiles and entry._is_of_these_versions()]

    def _is_of_these_versions(self) -> bool:
        requirements = map(Requirement, self.versions)
        return all(r.specifier.contains(version(r.name), prereleases=True) for r in requirements)

    def mark(self) -> pytest.MarkDecorator:
        """The strict xfail of this entry's tests."""
        raises = pytest.RaisesExc(BaseException, check=lambda error: bool(re.search(self.error, chain(error))))
        return pytest.mark.xfail(strict=True, reason=self.reason, raises=raises)


def chain(error: BaseException | None) -> str:
    """An error and those behind it, such as the one that came where a test waited for a warning."""
    lines = []
    while error is not None:
        lines.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(lines)


def matches(pattern: str, text: str) -> bool:
    """Whether a node id is of a pattern, in which only `*` is special."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text) is not None


class AlwaysCached(dict):
    """Stands for the memory of PEFT's `hub_online_once`, which goes online for a name that it does not hold."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--profile", choices=list(PROFILES), required=True)


def pytest_configure(config: pytest.Config) -> None:
    """Put the profile's config where tests import `LoraConfig` from, `peft` itself, before they do."""
    rotary_opt.register()
    changes = PROFILES[config.getoption("--profile")]
    if changes is None:
        return
    from peft_longlora import LongLoraConfig

    fields = [(name, type(value), value) for name, value in changes.items()]
    namespace = {"__module__": __name__}  # where pickle looks for it
    here = dataclasses.make_dataclass(LongLoraConfig.__name__, fields, bases=(LongLoraConfig,), namespace=namespace)
    globals()[here.__name__] = peft.LoraConfig = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("LONGLORA")] = here


def inputs_of_eight(self: Any) -> dict[str, torch.Tensor]:
    """In place of PEFT's rows of three equal tokens, whose values no position and no group can change.

    Returns: input_ids and attention_mask, (2, 8), one row padded on its left; both hold aLoRA's token, 1.
    """
    input_ids = torch.tensor([[9, 17, 5, 240, 1, 33, 8, 91], [0, 0, 7, 77, 120, 1, 45, 12]])
    return {"input_ids": input_ids, "attention_mask": (input_ids > 0).long()}


def pytest_runtest_setup() -> None:
    """Whatever ran before, the same random weights."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -k and --deselect, so that an unused pattern is one
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that are not about LoRA, and mark those that must fail."""
    sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = AlwaysCached()
    kept = [item for item in items if is_about_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for cls in {item.cls for item in items if hasattr(item.cls, "prepare_inputs_for_testing")}:
        cls.prepare_inputs_for_testing = inputs_of_eight
    files = {item.nodeid.partition("::")[0] for item in items}
    unlisted, unused = list(items), []
    for entry in Expectation.read(config.getoption("--profile")):
        for pattern in entry.tests:
            found = [item for item in items if matches(pattern, item.nodeid)]
            for item in set(found).intersection(unlisted):
                item.add_marker(entry.mark(), append=False)
            unlisted = [item for item in unlisted if item not in set(found)]
            if not found and pattern.partition("::")[0] in files:
                unused.append(pattern)
    if unused:
        raise pytest.UsageError(f"{EXPECTED.name} names tests that there are not: {', '.join(unused)}")


def is_about_lora(item: pytest.Item) -> bool:
    """Whether a test builds a `LoraConfig`: as a parameter, or in its code or what that calls."""
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    classes = [value for value in values if isinstance(value, type)] + [type(value) for value in values]
    configs = [cls for cls in classes if issubclass(cls, peft.PeftConfig)]
    if configs:
        return any(cls is peft.LoraConfig for cls in configs)
    fixtures = [definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found]
    return any(NAME in names_in(function, item.cls) for function in [item.function, *fixtures])


def names_in(function: Any, cls: type | None) -> set[str]:
    """Every name that a function of the suite uses, through the functions and methods of the suite that it calls."""
    seen: dict[str, Any] = {}
    queue = [function]
    while queue:
        function = queue.pop()
        for name in names_of(getattr(function, "__code__", None)):
            if name in seen:
                continue
            called = getattr(cls, name, None) or function.__globals__.get(name)
            seen[name] = called
            if getattr(called, "__module__", "").startswith("tests.") and hasattr(called, "__code__"):
                queue.append(called)
    return set(seen)


def names_of(code: CodeType | None) -> Iterator[str]:
    """Names in a function's code and in the functions and classes defined inside it."""
    if code is None:
        return
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_of(constant)

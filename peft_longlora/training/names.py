"""Names of modules in a recipe: commas and lists as people write them, and each name is one that the base has."""

from __future__ import annotations

import difflib
import re
from typing import Any

from torch import nn

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.names import is_end_of, is_last_of
from peft_longlora.adapter.regexes import check_patterns

PATTERNS = ("target_modules", "exclude_modules")  # a list of names, or a regular expression for whole names
SAVED = "modules_to_save"
NAMES = (*PATTERNS, SAVED)
ALL_LINEAR = "all-linear"  # PEFT's
_NAME = re.compile(r"[\w.-]+")
_SHOWN = 12


def as_names(value: Any) -> Any:
    """The value of such a key: "q_proj" and "q_proj, v_proj" are lists; "all-linear" and regular expressions stay."""
    if isinstance(value, list):
        return [part for each in value for part in (_split(each) or [each])]
    if not isinstance(value, str) or value == ALL_LINEAR:
        return value
    return _split(value) or value


def check_modules(model: nn.Module, config: LongLoraConfig) -> None:
    """Refuse each name that no module has; the adapter itself refuses only fields of which no name matches.

    Args:
        model: the base. config: not filled in yet.

    Raises: ValueError: names the key, the name, and the nearest that there is.
    """
    check_patterns(config, model)
    names = [name for name, _ in model.named_modules() if name]
    for key in NAMES:
        value = getattr(config, key)
        if value is None or value == ALL_LINEAR:
            continue
        whole = isinstance(value, str)
        for part in [value] if whole else sorted(value):
            match = re.fullmatch if whole else is_end_of if key == SAVED else is_last_of
            if not any(match(part, name) for name in names):
                raise ValueError(f"{key}={value if whole else part!r} {_rule(whole, part, names)}")


def _split(text: str) -> list[str]:
    """The names in a text with commas; none: it is no list of names."""
    parts = [part.strip() for part in text.split(",")]
    parts = [part for part in parts if part]
    return parts if all(_NAME.fullmatch(part) for part in parts) else []


def _rule(whole: bool, part: str, names: list[str]) -> str:
    ends = list(dict.fromkeys(end for name in names if not (end := name.rsplit(".", 1)[-1]).isdigit()))
    near = difflib.get_close_matches(part, ends, n=1)
    shown = f"{', '.join(ends[:_SHOWN])}{' and more' if len(ends) > _SHOWN else ''}"
    hint = f"Did you mean {near[0]!r}?" if near else f"Their names end in {shown}."
    if not whole:
        return f"is the name of no module of the base. {hint} Correct it, or leave it out."
    full = max(names, key=lambda name: name.count("."))
    return (
        f"is a regular expression that matches no module's whole name, which is as {full!r}. {hint} Correct it, as in "
        f"'.*\\.{full.rsplit('.', 1)[-1]}', or write names with commas."
    )

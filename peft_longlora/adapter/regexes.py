"""Regular expressions in an adapter's config, tried out in a process that can be stopped.

PEFT matches several fields of a config with every module's name. A pattern with nested repetitions can take years for
one name, and Python cannot interrupt a match. Loading another person's adapter must not hang.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

from peft import PeftConfig
from torch import nn

SECONDS = 10
_TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for is_full, pattern in patterns:
    match = re.compile(pattern).fullmatch if is_full else re.compile(pattern).match
    for name in names:
        match(name)
"""
_REPEATS = re.compile(r"[*+?{]")


def check_patterns(config: PeftConfig, model: nn.Module) -> None:
    """Refuse a config, of any type, with a pattern that is no regular expression, or takes too long on a model's names.

    Raises: ValueError.
    """
    check_patterns_on(config, [name for name, _ in model.named_modules()])


def check_patterns_on(config: PeftConfig, names: list[str]) -> None:
    """As `check_patterns`, on the names alone.

    Raises: ValueError.
    """
    for pattern in _written_in(config):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{pattern!r} in this adapter's config cannot be used: it is no regular expression ({error}). Name the "
                f"modules in a list, or correct it."
            ) from error
    patterns = [(full, pattern) for full, pattern in _patterns_of(config) if _REPEATS.search(pattern)]
    if not patterns:
        return
    command = [sys.executable, "-I", "-S", "-c", _TRY]
    try:
        text = json.dumps([patterns, names])
        done = subprocess.run(command, input=text, text=True, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        reason = f"take longer than {SECONDS} s on this model's {len(names)} names"
    else:
        if done.returncode == 0:
            return
        reason = f"cannot be used ({done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode})"
    raise ValueError(
        f"The regular expressions of this adapter's config {reason}: {[pattern for _, pattern in patterns]}. Name the "
        f"modules in a list instead. If somebody else made the adapter, do not trust it."
    )


def _written_in(config: PeftConfig) -> list[str]:
    """The regular expressions as the config has them."""
    whole, keys, saved, layers = _fields(config)
    return [*whole, *(key for key in [*keys, *saved] if _is_pattern(key)), *_as_list(layers)]


def _patterns_of(config: PeftConfig) -> list[tuple[bool, str]]:
    """The patterns that PEFT matches, as it matches them, and whether with a whole name."""
    whole, keys, saved, layers = _fields(config)
    return [
        *((True, value) for value in whole),
        *((False, rf"(.*\.)?({key})$") for key in keys if _is_pattern(key)),
        *((False, rf"(^|.*\.){name}($|\..*)") for name in saved if _is_pattern(name)),
        *((False, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.") for name in _as_list(layers)),
    ]


def _fields(config: PeftConfig) -> tuple[list[str], list[str], list[str], Any]:
    """The fields that hold patterns; other types of adapters lack some."""
    whole = [getattr(config, name, None) for name in ("target_modules", "exclude_modules")]
    keys = [key for name in ("rank_pattern", "alpha_pattern") for key in getattr(config, name, None) or ()]
    saved = list(getattr(config, "modules_to_save", None) or ())
    return [value for value in whole if isinstance(value, str)], keys, saved, getattr(config, "layers_pattern", None)


def _is_pattern(text: Any) -> bool:
    """Whether more than dots is special in a name of a module."""
    return isinstance(text, str) and re.escape(text.replace(".", "")) != text.replace(".", "")


def _as_list(value: Any) -> list[str]:
    return [each for each in ([value] if isinstance(value, str) else value or ()) if _is_pattern(each)]

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

from peft import LoraConfig
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


def check_patterns(config: LoraConfig, model: nn.Module) -> None:
    """Refuse a config with a pattern that is no regular expression, or takes too long on a model's names.

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
    names = [name for name, _ in model.named_modules()]
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


def _written_in(config: LoraConfig) -> list[str]:
    """The regular expressions as the config has them."""
    whole = [value for value in (config.target_modules, config.exclude_modules) if isinstance(value, str)]
    keys = [*(config.rank_pattern or ()), *(config.alpha_pattern or ()), *(config.modules_to_save or ())]
    return [*whole, *(key for key in keys if _is_pattern(key)), *_as_list(config.layers_pattern)]


def _patterns_of(config: LoraConfig) -> list[tuple[bool, str]]:
    """The patterns that PEFT matches, as it matches them, and whether with a whole name."""
    whole = [value for value in (config.target_modules, config.exclude_modules) if isinstance(value, str)]
    keys = [*(config.rank_pattern or ()), *(config.alpha_pattern or ())]
    return [
        *((True, value) for value in whole),
        *((False, rf"(.*\.)?({key})$") for key in keys if _is_pattern(key)),
        *((False, rf"(^|.*\.){name}($|\..*)") for name in config.modules_to_save or () if _is_pattern(name)),
        *((False, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.") for name in _as_list(config.layers_pattern)),
    ]


def _is_pattern(text: Any) -> bool:
    """Whether more than dots is special in a name of a module."""
    return isinstance(text, str) and re.escape(text.replace(".", "")) != text.replace(".", "")


def _as_list(value: Any) -> list[str]:
    return [each for each in ([value] if isinstance(value, str) else value or ()) if _is_pattern(each)]

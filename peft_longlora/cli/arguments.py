"""What command lines share: a parser with errors on one line, and numbers."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse with errors on one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _numbers(text: str) -> list[int]:
    parts = text.lower().split(",")
    try:
        numbers = [int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 4096,8192 or 4k,8k") from None
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return numbers


def _percents(text: str) -> list[float]:
    try:
        numbers = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of percents such as 0,50,100") from None
    if not all(0 <= number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} holds a percentage outside 0 to 100")
    return numbers


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return int(text)


def refuse_file(output: Path) -> None:
    """Refuse an --output that is a file, or lies in one, before there is anything to write.

    Raises: ValueError.
    """
    if found := next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None):
        raise ValueError(f"--output {output}: {found} is a file. Give a folder.")


def positive(text: str) -> int:
    """A number of 1 or more, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _number(text: str, low: float, high: float, rule: str) -> float:
    with contextlib.suppress(ValueError):
        if low <= float(text) <= high:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number {rule}")


def _temperature(text: str) -> float:
    return _number(text, 0, 100, "from 0 to 100")


def _share(text: str) -> float:
    return _number(text, 1e-6, 1, "above 0 and up to 1")

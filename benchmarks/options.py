"""Options of the scripts beside it: whatever is wrong with a command line is said in one line, with code 2, at once.

parser = Parser(__doc__)
with parser.refusing():
    ...  # what depends on the user's files and numbers, before anything is measured
"""

import argparse
from pathlib import Path

import torch

from peft_longlora.cli.arguments import Parser as OneLine
from peft_longlora.cli.arguments import count, numbers, positive

__all__ = ["Parser", "above_zero", "count", "device_here", "new_file", "numbers", "old_file", "positive"]


class Parser(OneLine):
    """A parser whose help is the script's own text."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def above_zero(text: str) -> float:
    """A number above 0, such as 0.4."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def device_here(text: str) -> str:
    """A device that is here, such as cpu or cuda."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of this machine. Give cpu, or cuda") from None
    return text


def old_file(text: str) -> Path:
    """A file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return Path(text)


def new_file(text: str) -> Path:
    """A file to write, in a folder that is there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder. Give a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: the folder {path.parent} does not exist. Make it first")
    return path

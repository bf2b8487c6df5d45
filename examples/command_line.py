"""Shared by the scripts: command lines whose errors are one line and code 2, and names that differ between releases.

parser = Parser(__doc__)
with parser.refusing():
    ...  # everything that depends on the user's input, before the training
"""

import argparse
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainingArguments


class Parser(argparse.ArgumentParser):
    """A parser with the script's first lines as its help, and errors on one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        # Who runs a script can do nothing about names that are old for one of its libraries and not for another.
        warnings.filterwarnings("ignore", category=FutureWarning)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Errors about what the user gave (files, models, numbers) end the script as errors in its options do."""
        try:
            yield
        except (ValueError, OSError, ImportError, NotImplementedError) as error:
            self.error(" ".join(str(error).split()))


def positive(text: str) -> int:
    """A number of 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def count(text: str) -> int:
    """A number of 0 or more."""
    return 0 if text == "0" else positive(text)


def rate(text: str) -> float:
    """A number above 0, such as 2e-4."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def check_output(folder: str | Path) -> None:
    """Refuse an --output that is a file, or lies in one, before there is anything to write.

    Raises: ValueError.
    """
    for path in (Path(folder), *Path(folder).parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output {folder}: {path} is a file. Give a folder.")


def checkpointing() -> dict[str, Any]:
    """Arguments of a Trainer that computes activations again in the backward; transformers 5.24 renamed them."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}

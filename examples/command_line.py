"""Shared by the scripts: command lines whose errors are one line and code 2, and names that differ between releases.

parser = Parser(__doc__)
with parser.refusing():
    ...  # everything that depends on the user's input, before the training
"""

import argparse
import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from peft_longlora.cli.arguments import Parser as OneLine
from peft_longlora.cli.arguments import count, positive

__all__ = ["Parser", "check_output", "checkpointing", "count", "is_fitted", "positive", "rate"]


class Parser(OneLine):
    """A parser with the script's first lines as its help, and errors on one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        # Who runs a script can do nothing about names that are old for one of its libraries and not for another.
        warnings.filterwarnings("ignore", category=FutureWarning)


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


def is_fitted(tokens: int) -> bool:
    """Whether `fit_memory` can choose what is computed again: one process, on a GPU, with steps that are not short."""
    return torch.cuda.is_available() and os.environ.get("WORLD_SIZE", "1") == "1" and tokens >= 4096


def checkpointing(fitted: bool = False) -> dict[str, Any]:
    """Arguments of a Trainer that computes activations again in the backward; transformers 5.24 renamed them.

    Args:
        fitted: whether `fit_memory` chooses what is computed again. Then the Trainer must not.
    """
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    if fitted:
        return {name: False}
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}

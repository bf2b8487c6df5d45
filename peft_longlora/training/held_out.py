"""Held-out data that is training data by its name or place. `run` compares the texts, too."""

from __future__ import annotations

from pathlib import Path

from peft_longlora.training.options import RunOptions, is_on_hub


def check_apart(options: RunOptions) -> None:
    """Refuse held-out data that is training data by its place; reads nothing.

    Raises: ValueError.
    """
    for held in options.eval_data or ():
        for name in options.data:
            if is_on_hub(held) or is_on_hub(name):
                is_same = held == name and options.split == options.eval_split
            else:
                places = [Path(held).resolve(), Path(name).resolve()]
                is_same = places[0] == places[1]
                if options.repositories:  # a document is a whole tree, which holds what lies in it
                    is_same = is_same or places[0] in places[1].parents or places[1] in places[0].parents
            if is_same:
                raise ValueError(f"eval_data holds {held!r}, which is training data: {name!r}. Hold other data out.")

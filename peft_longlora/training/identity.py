"""What a run is trained on: its rows and its base. A run does not go on with others under the same names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from peft_longlora.data.loading import digest_of
from peft_longlora.eval.identity import Digests, fingerprint
from peft_longlora.hub.writing import write_whole
from peft_longlora.training.damage import read_object
from peft_longlora.training.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

NOTED = "trained_on.json"  # beside the checkpoints
DIGESTS = "digests.json"  # of the base's files, so that they are read once
CHANGED = {
    "rows": ("data", "the texts, or what the tokenizer makes of them, have changed"),
    "base": ("model", "its weights or its config have changed"),
}


def trained_on(recipe: Recipe, rows: Dataset, commit: str | None, *, stores: bool = True) -> dict[str, str]:
    """Digests of the rows and of the base: of its files, or its commit on the Hub.

    Args:
        rows: of `load_rows`.
        commit: of a base on the Hub.
        stores: keep digests of files in the output folder, if it exists; False: nothing is written.
    """
    folder = recipe.output_dir
    digests = Digests(folder / DIGESTS if stores and folder.is_dir() else None)
    return {"rows": digest_of(rows), "base": fingerprint(recipe.run.model, digests, commit)}


def check_trained_on(recipe: Recipe, now: dict[str, str]) -> None:
    """Refuse to go on from checkpoints of other rows or of another base.

    Raises: ValueError: they changed, or the note cannot be read. A run of a version that noted neither is not refused.
    """
    path = recipe.output_dir / NOTED
    try:
        before = read_object(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}. It says which rows and which base the run began with. Delete it if they are "
            f"the same, or --overwrite to begin anew."
        ) from error
    for part, (key, changed) in CHANGED.items():
        if before.get(part, now[part]) != now[part]:
            value = recipe.values[key]
            raise ValueError(
                f"{key}={value!r}: {changed} since the run in output_dir={str(recipe.output_dir)!r} began. Put them "
                f"back as they were, give another output_dir, or --overwrite to begin anew."
            )


def note_trained_on(folder: Path, now: dict[str, str]) -> None:
    """Write what a run is trained on beside its checkpoints."""
    write_whole(folder / NOTED, json.dumps(now, indent=1) + "\n")

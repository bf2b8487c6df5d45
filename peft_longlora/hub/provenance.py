"""Which weights the results and the training notes beside an adapter belong to, and when they come along with it."""

from __future__ import annotations

import filecmp
import hashlib
import json
import shutil
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME

from peft_longlora.hub.results import RESULTS, copy_results, read_results
from peft_longlora.hub.writing import write_whole, writing

TRAINING = "training.json"  # what a training says of itself
RECIPE = "recipe.yaml"  # what `longlora train` was told, without paths of the machine
BLOCK = 8 * 2**20  # bytes that are read at once


def carry_results(source: str | Path | None, folder: Path) -> None:
    """Copy results and plots from the folder that an adapter was loaded from or last saved in.

    Only if the weights in both folders are the same: results of other weights are no results of these.

    Raises: ValueError: `read_results` refuses the source's results.
    """
    if source is None or Path(source).resolve() == folder.resolve():
        return
    source = Path(source)
    if not ((source / RESULTS).is_file() or any(source.glob("*.png"))) or not _have_same_weights(source, folder):
        return
    if (source / RESULTS).is_file():
        copy_results(source, folder)
        return
    for name in read_results(source)[1]:
        with (source / name).open("rb") as content, writing(folder / name) as copy:
            shutil.copyfileobj(content, copy)


def measured_weights(folder: Path) -> str | None:
    """The SHA-256 of the weights file that a folder's results.json belongs to; None if it does not say."""
    try:
        model = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["model"]
        return model["weights_sha256"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):  # none, or `read_results` says what is wrong
        return None


def is_of_other_weights(folder: Path, weights: str | None = None) -> bool:
    """Whether a folder's results.json belongs to other weights than the adapter's. False if the file does not say.

    Args:
        weights: the SHA-256 of the adapter's weights file; None: it lies in the same folder.
    """
    measured, file = measured_weights(folder), folder / SAFETENSORS_WEIGHTS_NAME
    if measured is None or (weights is None and not file.is_file()):
        return False
    return measured != (weights or sha256(file))


def read_training(folder: Path, weights: str | None = None) -> list[str]:
    """What `longlora train` says of an adapter's data and training, for its card; nothing if the weights are others.

    Args:
        weights: the SHA-256 of the adapter's weights file; None: it lies in the same folder.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        training = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        lines, made = training["lines"], training["weights_sha256"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    is_own = made == (weights or (sha256(file) if file.is_file() else None))
    return [line for line in lines if isinstance(line, str)] if is_own and isinstance(lines, list) else []


def write_training(folder: Path, lines: list[str]) -> None:
    """Keep what a training says of itself beside the weights that it made."""
    content = {"weights_sha256": sha256(folder / SAFETENSORS_WEIGHTS_NAME), "lines": lines}
    write_whole(folder / TRAINING, json.dumps(content, indent=1) + "\n")


def sha256(file: Path) -> str:
    """What the command `sha256sum` prints of a file."""
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    with file.open("rb", buffering=0) as content:
        while n := content.readinto(block):
            digest.update(memoryview(block)[:n])  # other threads run meanwhile
    return digest.hexdigest()


def _have_same_weights(first: Path, second: Path) -> bool:
    files = [folder / SAFETENSORS_WEIGHTS_NAME for folder in (first, second)]
    return all(file.is_file() for file in files) and filecmp.cmp(*files, shallow=False)

"""Whether the files that a run goes on from can be read; a killed process or a full disk leaves files cut short.

They are looked at before anything slow, and before the Trainer reads them.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

OF_TORCH = ("optimizer*.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")  # torch.save writes zip files
OPTIMIZER = ("optimizer.pt", "scheduler.pt")
SHARED_OUT = ("optimizer.bin", "optimizer_*", "pytorch_model_fsdp_*", "global_step*", "user_content.pt")


def check_checkpoint(last: Path, others: list[Path], *, has_optimizer: bool) -> None:
    """Refuse a checkpoint with a file that cannot be read, or without its optimizer.

    Args:
        last: the checkpoint. others: older ones of the same run, newest first.
        has_optimizer: whether it was saved with its optimizer.

    Raises: ValueError: names the file, and where the run goes on without this checkpoint.
    """
    reason = damage_of(last)
    is_shared_out = any(path for name in SHARED_OUT for path in last.glob(name))  # by FSDP or DeepSpeed
    if reason is None and has_optimizer and not is_shared_out:
        reason = next((f"{last / name} is missing" for name in OPTIMIZER if not (last / name).is_file()), None)
    if reason is not None:
        rest = f"goes on from {others[0]}" if others else "begins anew"
        raise ValueError(f"{reason}. Delete {last}: the run then {rest}.")


def damage_of(folder: Path) -> str | None:
    """The first file of an adapter or a checkpoint that cannot be read, and why; None: all can."""
    reads: dict[str, Callable[[Path], Any]] = {
        "*.safetensors": _read_safetensors,
        "adapter_config.json": read_object,
        "trainer_state.json": _read_state,
        **dict.fromkeys(OF_TORCH, _read_zip),
    }
    for name, read in reads.items():
        for path in sorted(folder.glob(name)):
            try:
                read(path)
            except (OSError, ValueError) as error:
                return f"{path} ({path.stat().st_size} bytes) is damaged: {error}"
    return None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: ValueError: there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises: ValueError: there is none."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(getattr(error, "problem", None) or "no YAML") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a mapping")
    return found


def _read_state(path: Path) -> None:
    step = read_object(path).get("global_step")
    if type(step) is not int:
        raise ValueError(f"global_step is {step!r}, not a whole number")


def _read_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _read_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if wrong is not None:
        raise ValueError(f"the part {wrong} is not what was written")

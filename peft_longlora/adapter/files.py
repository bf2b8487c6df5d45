"""An adapter's files, in a folder or on the Hub: read, or refused."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    pass


_AGAIN = "Get it again, or save the adapter anew."


@dataclass(frozen=True)
class AdapterFile:
    """The table of contents of an adapter's safetensors file: tensor names and shapes, no weights."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Read the header of a safetensors file.

        Raises: ValueError: the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return cls(path, {name: tuple(file.get_slice(name).get_shape()) for name in names})
        except SafetensorError as error:
            cure = "Copy or download it again."
            if "snapshots" in path.parts:  # in the Hub's cache, which downloads nothing that it has
                cure = f"Delete {path.resolve()}, or load with force_download=True, and check the file on the Hub."
            raise ValueError(f"{path} ({path.stat().st_size} bytes) is damaged: {error}. {cure}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json.

    Raises: ValueError: it is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}. {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the object that PEFT writes. {_AGAIN}")
    return content


def refuse_link(file: Path) -> None:
    """Refuse a file of an adapter that is a link out of its folder; in the Hub's cache all files are links.

    Raises: ValueError.
    """
    target, folder = file.resolve(), file.parent.resolve()
    repository = next((parent.parent for parent in folder.parents if parent.name == "snapshots"), folder)
    if file.is_symlink() and not target.is_relative_to(repository):
        raise ValueError(
            f"{file} is a link to {target}, out of the adapter's folder. Put the file itself there, or load the "
            f"folder that holds it."
        )


def hub_id(name: Any) -> str | None:
    """`name` if it can be the id of a repository on the Hub, and None if it is a folder or anything else."""
    if not isinstance(name, str) or os.path.isdir(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name

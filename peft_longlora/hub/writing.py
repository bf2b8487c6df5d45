"""Writes a file completely or not at all: after a crash the old file is there, never half of the new one.

Also what stands in the way of writing into a folder, asked before anything slow begins.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO


@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a draft to write into. When all of it is on the disk, it replaces `path`.

    The draft is in the same folder, because only there can a file be replaced in one step. After an error the draft is
    deleted.
    """
    path = Path(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file completely or not at all; text is written in UTF-8."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def file_in_the_way(folder: Path) -> Path | None:
    """What is no folder, at the place of a folder or of one around it; None if nothing is."""
    return next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)


def why_unwritable(folder: Path) -> str | None:
    """Why no file can be made in a folder; None if one can.

    A folder that does not exist is not made: the nearest one around it is tried. Nothing stays behind.
    """
    try:
        with TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            return None
    except OSError as error:
        return error.strerror or str(error)

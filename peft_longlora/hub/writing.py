"""Files that are written whole or not at all: a crash leaves the old one, never half of the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` when all of it is on the disk.

    It stands beside `path` meanwhile, because only within a folder is a file replaced in one step. After an error
    nothing is left of it.
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
    """Write a file, text in UTF-8."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)

"""The text of a source tree: all files that people wrote, in the order of their paths, each under its path.

Called by rows.py. Files that people did not write, or that hold no text, are left out and counted by reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from peft_longlora.data.counts import Counts

HEADER = "=== {path} ===\n"
LARGEST = 2**20  # bytes; larger texts are data, or written by a program
LONGEST_LINE = 5000  # characters; longer lines are written by a program
HEAD = 1000  # characters in which a file says that it is generated

HISTORY = {".git", ".hg", ".svn"}  # not files of the tree, so they are not counted
VENDORED = {"node_modules", "bower_components", "vendor", "third_party", "third-party", "thirdparty", "site-packages"}
VENDORED |= {".venv", "venv"}
BUILT = {"__pycache__", "dist", ".tox", ".nox", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".gradle", ".idea"}
LOCKS = {"package-lock.json", "npm-shrinkwrap.json", "pnpm-lock.yaml", "go.sum", "bun.lockb", "gradle.lockfile"}
GENERATED_NAME = re.compile(r"(\.min\.(js|css)|\.map|_pb2(_grpc)?\.pyi?|\.pb\.(go|cc|h)|\.g\.dart|\.designer\.cs)$")
GENERATED_HEAD = re.compile(
    r"@generated|do not edit|(auto[- ]?|automatically |code )generated|generated (automatically|by|from)", re.IGNORECASE
)


def find_repositories(folder: Path, counts: Counts | None = None) -> list[Path]:
    """The outermost folders that hold a .git, in the order of their paths; the folder itself if there is none.

    Args:
        counts: counts the links to folders outside of them, which are not followed.
    """
    if (folder / ".git").exists():
        return [folder]
    found, links = [], 0
    for place, folders, _ in os.walk(folder):
        folders[:] = sorted(set(folders) - HISTORY - VENDORED - BUILT)
        if place != str(folder) and (Path(place) / ".git").exists():
            found.append(Path(place))
            folders.clear()
        links += sum((Path(place) / name).is_symlink() for name in folders)
    if found and links and counts is not None:  # without repositories, `read_repository` counts them
        counts.leave_out("links", links)
    return sorted(found) or [folder]


def read_repository(folder: Path, counts: Counts) -> str:
    """One text of a tree's files: before each file a line with its path, after it an empty line.

    Left out: links, binary and empty files, files above 1 MiB or with a line above 5000 characters, lock files, files
    that a program wrote (by their name or their first lines), and folders of other people's code or of a build.

    Args:
        counts: counts the files that are read, and by reason those that are left out.

    Raises: ValueError: no file is left.
    """
    parts = []
    for path in _files(folder, counts):
        text = _text(path, counts)
        if text is not None:
            parts.append(HEADER.format(path=path.relative_to(folder).as_posix()) + text.rstrip() + "\n\n")
    if not parts:
        raise ValueError(f"{folder}: no file of source text in it. Check the path.")
    counts.kept += len(parts)
    return "".join(parts)


def _files(folder: Path, counts: Counts) -> Iterator[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        for name in set(folders) & (VENDORED | BUILT):
            reason = "vendored files" if name in VENDORED else "built files"
            if count := sum(len(files) for _, _, files in os.walk(here / name)):
                counts.leave_out(reason, count)
        folders[:] = set(folders) - HISTORY - VENDORED - BUILT
        if links := sum((here / name).is_symlink() for name in folders):
            counts.leave_out("links", links)
        found += [here / name for name in names if name not in HISTORY]
    yield from sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _text(path: Path, counts: Counts) -> str | None:
    """A file's text; None, and counted, if it is left out."""
    reason = None
    text = ""
    if path.is_symlink() or not path.is_file():
        reason = "links"
    elif path.name.lower() in LOCKS or path.suffix == ".lock":
        reason = "lock files"
    elif GENERATED_NAME.search(path.name.lower()):
        reason = "generated files"
    elif path.stat().st_size > LARGEST:
        reason = "binary files" if _is_binary(path) else "files above 1 MiB"
    else:
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            reason = "binary files"
        else:
            if "\0" in text:
                reason = "binary files"
            elif not text.strip():
                reason = "empty files"
            elif max(map(len, text.splitlines())) > LONGEST_LINE or GENERATED_HEAD.search(text[:HEAD]):
                reason = "generated files"
    if reason:
        counts.leave_out(reason)
        return None
    return text.replace("\r\n", "\n")


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(2**13)

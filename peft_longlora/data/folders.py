"""Everything in a folder and in the folders that links in it lead to, each folder once."""

from __future__ import annotations

import os
from pathlib import Path

READ_ANYWAY = "links to folders that are read anyway"
AROUND = "links to a folder around this one"


def walk(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """All that is no folder, in the order of the paths, and the links to folders that are not followed, with reasons.

    A folder is read once, under its own place if it has one in `folder`, so links that lead round in circles end.

    Args:
        folder: where to begin.
    """
    top = folder.resolve()
    seen: set[Path] = set()
    found: list[Path] = []
    left_out: dict[Path, str] = {}
    links = _read(folder, seen, found)
    while links:
        link = links.pop(0)
        real = link.resolve()
        if real in top.parents:
            left_out[link] = AROUND
        elif real in seen:
            left_out[link] = READ_ANYWAY
        else:
            links = sorted([*links, *_read(link, seen, found)])
    return sorted(found), left_out


def _read(folder: Path, seen: set[Path], found: list[Path]) -> list[Path]:
    """Add what a folder holds; returns the links to folders in it."""
    links = []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if here.resolve() in seen:
            folders.clear()
            continue
        seen.add(here.resolve())
        links += [here / name for name in folders if (here / name).is_symlink()]
        found += [here / name for name in names]
    return sorted(links)

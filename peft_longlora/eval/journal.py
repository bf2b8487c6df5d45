"""The journal of a run: one JSON line for each finished window or prompt, so that a killed run goes on.

While a run lasts, process r appends to samples-r.jsonl; at its end the main process makes one samples.jsonl of them.
run.json says which run the lines belong to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN, SAMPLES = "run.json", "samples.jsonl"


class Journal:
    """Finished samples of one run, in a folder.

    Args:
        folder: of the run, created if need be.
        rank: number of this process.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder = Path(folder)
        self.path = self.folder / f"samples-{rank}.jsonl"
        self._file = None

    def open(self, identity: dict[str, Any], overwrite: bool = False, is_main: bool = True) -> None:
        """Begin or go on; the main process does so before any other.

        Args:
            identity: what must be the same for lines to belong to one run: {"model": ..., "settings": ..., and, by
                task, parameters and data}. Tasks may be added later, but not changed.
            overwrite: throw away what is there.

        Raises:
            ValueError: the folder holds another run.
        """
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for path in [*self.folder.glob("samples*.jsonl"), *self.folder.glob(RUN)]:
                    path.unlink()
            run = self.folder / RUN
            identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
            if run.is_file():
                old = json.loads(run.read_text(encoding="utf-8"))
                for key in sorted(old.keys() & identity.keys()):
                    if old[key] != identity[key]:
                        raise ValueError(
                            f"{self.folder} holds another run: its {key} is {_difference(old[key], identity[key])}. "
                            f"Choose another --output, or pass --overwrite."
                        )
                identity = {**old, **identity}
            elif list(self.folder.glob("samples*.jsonl")):
                raise ValueError(f"{self.folder} holds samples, but no {RUN}. Choose another --output.")
            run.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        if self.path.is_file():
            self._cut_half_line()
        self._file = self.path.open("a", encoding="utf-8")

    def _cut_half_line(self) -> None:
        """Forget the line that was being written when the run was killed."""
        with self.path.open("rb+") as file:
            file.seek(0, 2)
            end = file.tell()
            while end:
                file.seek(end - 1)
                if file.read(1) == b"\n":
                    break
                end -= 1
            file.truncate(end)

    def done(self) -> set[str]:
        """Keys of all finished samples, of any process."""
        return {record["key"] for record in self.records()}

    def records(self) -> Iterator[dict[str, Any]]:
        """Finished samples of all processes, each key once, one at a time."""
        seen: set[str] = set()
        paths = [self.folder / SAMPLES, *sorted(self.folder.glob("samples-*.jsonl"))]
        for path in paths:
            if not path.is_file():
                continue
            with path.open(encoding="utf-8") as file:
                for line in file:
                    if line.endswith("\n"):
                        record = json.loads(line)
                        if record["key"] not in seen:
                            seen.add(record["key"])
                            yield record

    def write(self, record: dict[str, Any]) -> None:
        """Append one finished sample; it is on disk when this returns."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def merge(self) -> None:
        """Make one file of all processes' samples. For the main process, when all others have closed theirs."""
        draft = self.folder / f"{SAMPLES}.draft"
        with draft.open("w", encoding="utf-8") as file:
            for record in self.records():
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        draft.replace(self.folder / SAMPLES)
        for path in self.folder.glob("samples-*.jsonl"):
            path.unlink()


def _difference(old: Any, new: Any) -> str:
    """The first entry in which two settings differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return f"{key}={old.get(key)!r}, now {new.get(key)!r}"
    return f"{old!r}, now {new!r}"

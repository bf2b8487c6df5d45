"""The journal of a run: one JSON line for each finished window or prompt, so that a stopped run can continue.

During a run process r appends to samples-r.jsonl. At the end the main process makes one samples.jsonl from these files.
run.json says to which run the lines belong. `lock` keeps a second run out of the folder; where a file system has no
locks, two runs in one folder still lose no sample.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers.utils import logging

from peft_longlora.eval.lock import LOCK, FolderLock
from peft_longlora.eval.samples import SAMPLES, read_samples
from peft_longlora.hub.results import PLOTS, RESULTS
from peft_longlora.hub.writing import why_unwritable, write_whole, writing

RUN = "run.json"
DIGESTS = "digests.json"
WRITTEN = (RUN, "samples*.jsonl", RESULTS, "results.md")  # belongs to one run, as the plots do
_MERGING = re.compile(r"\.[0-9a-f]{32}\.merging")
logger = logging.get_logger(__name__)


class Journal:
    """Finished samples of one run, in a folder.

    Args:
        folder: the folder of the run; it is created if necessary.
        rank: number of this process.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder = Path(folder)
        self.path = self.folder / f"samples-{rank}.jsonl"
        self._lock = FolderLock(self.folder)
        self._file = None
        self._damaged: set[str] = set()

    def check(self) -> None:
        """Refuse a folder that cannot be written or in which another run is, before a model is loaded for it.

        Nothing stays behind: a folder that does not exist is not made.

        Raises: ValueError.
        """
        refuse_folders(self.folder)
        if reason := why_unwritable(self.folder):
            raise self._unwritable(reason)
        if (self.folder / LOCK).is_file():
            self._lock.take()
            self._lock.release()

    def _unwritable(self, reason: str) -> ValueError:
        return ValueError(
            f"output={str(self.folder)!r} cannot be written ({reason}). Give a folder that you may write to."
        )

    def lock(self) -> None:
        """Keep other runs out of the folder until `release` or the end of this process. The main process calls it.

        Raises: ValueError: another run is in it, or it cannot be written.
        """
        refuse_folders(self.folder)
        if not self._lock.is_held:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock.take()
            except OSError as error:
                raise self._unwritable(error.strerror or str(error)) from error

    def release(self) -> None:
        """Let other runs into the folder."""
        self._lock.release()

    def open(self, identity: dict[str, Any], overwrite: bool = False, is_main: bool = True) -> None:
        """Begin or continue a run. The main process calls it before the others, after `lock`.

        If the folder holds another run that has ended, that run moves to a folder in it, earlier-1 or the next number.

        Args:
            identity: everything that must be equal in one run: {"model": ..., "versions": ..., and for each task its
                parameters and data}. Tasks may be added later, but not changed.
            overwrite: delete what the folder holds.

        Raises:
            ValueError: the folder holds another run that has not ended, or its run.json is damaged.
        """
        if is_main:
            self._check(identity, overwrite)
        if self.path.is_file():
            self._cut_half_line()
        self._file = self.path.open("ab")

    def _check(self, identity: dict[str, Any], overwrite: bool) -> None:
        """Check that the folder holds this run or none, and write run.json."""
        for path in self.folder.glob("*.[0-9]*.draft"):
            path.unlink()  # of a process that was killed while it wrote: nobody else is here
        if overwrite:
            # Results too: otherwise they would be beside the samples of another run until this run ends.
            for name in ("samples*.jsonl", RUN, RESULTS):
                for path in self.folder.glob(name):
                    path.unlink()
        run = self.folder / RUN
        identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
        if run.is_file():
            old = self._read_run(run)
            changed = next((key for key in sorted(old.keys() & identity.keys()) if old[key] != identity[key]), None)
            if changed is None:
                identity = {**old, **identity}
            else:
                holds = f"in its {changed}, {_difference(old[changed], identity[changed])}"
                self._move_aside(holds)
        elif list(self.folder.glob("samples*.jsonl")):
            raise ValueError(f"{self.folder} holds samples, but no {RUN}. Choose another output=...")
        write_whole(run, json.dumps(identity, indent=1) + "\n")

    def _move_aside(self, holds: str) -> None:
        """Move another run out of the way, if it has ended. One that has not is more likely to be continued.

        Raises: ValueError.
        """
        if not (self.folder / RESULTS).is_file() or list(self.folder.glob("samples-*.jsonl")):
            raise ValueError(
                f"{self.folder} holds another run: {holds}. That run has not ended: continue it as it began, choose "
                f"another output=..., or pass overwrite=True."
            )
        number = 1
        while (earlier := self.folder / f"earlier-{number}").exists():
            number += 1
        earlier.mkdir()
        for path in [path for name in WRITTEN for path in self.folder.glob(name)] + _plots_in(self.folder):
            path.replace(earlier / path.name)
        logger.warning(f"{self.folder} held another run: {holds}. Its files are in {earlier} now.")

    @staticmethod
    def _read_run(run: Path) -> dict[str, Any]:
        try:
            content = json.loads(run.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, not an object")
            return content
        except (ValueError, RecursionError) as error:  # JSONDecodeError names line and column
            raise ValueError(
                f"{run} is damaged ({type(error).__name__}: {error}), and it says which run the samples beside it "
                f"belong to. Restore the file, choose another output=..., or pass overwrite=True to measure all again."
            ) from error

    def _cut_half_line(self) -> None:
        """Remove an incomplete last line, which was being written when the run was killed."""
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
        """The finished samples of all processes, one by one, each key once.

        A damaged line is left out with a warning, so its window or prompt is measured again.
        """
        seen: set[str] = set()
        for path in [self.folder / SAMPLES, *sorted(self.folder.glob("samples-*.jsonl"))]:
            for record in read_samples(path, self._warn):
                if record["key"] not in seen:
                    seen.add(record["key"])
                    yield record

    def _warn(self, what: str) -> None:
        what = _MERGING.sub("", what)
        if what not in self._damaged:
            self._damaged.add(what)
            logger.warning(f"{what} Its window or prompt is measured again; all other lines are kept.")

    def write(self, record: dict[str, Any]) -> None:
        """Append one finished sample. When this returns, the operating system has it, so a killed process loses
        nothing.

        If the machine loses power, the last lines may be lost or damaged; they are measured again.
        """
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        while not self._is_in_place():  # a second run, which no lock kept out, has merged the folder meanwhile
            self._file.close()
            self._file = self.path.open("ab")
            self._file.write(line)
            self._file.flush()

    def _is_in_place(self) -> bool:
        """Whether the open file is still the one that has this process's name."""
        mine = os.fstat(self._file.fileno())
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def close(self) -> None:
        """Close this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def merge(self) -> None:
        """Make one file from the samples of all processes. The main process calls it when the others have closed their
        files."""
        parts = sorted(self.folder.glob("samples-*.jsonl"))
        for index, path in enumerate(parts):
            if not _MERGING.search(path.name):  # of a merge that was stopped
                # Under another name first: who still writes into it sees that, and writes the line again.
                parts[index] = path.replace(path.with_suffix(f".{uuid4().hex}.merging.jsonl"))
        with writing(self.folder / SAMPLES) as file:
            for record in self.records():
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        for path in parts:
            path.unlink(missing_ok=True)


def refuse_folders(output: Path) -> None:
    """Refuse a folder for results in which something other than a file has the name of a file that will be written.

    Raises: ValueError.
    """
    written = [path for name in (*WRITTEN, DIGESTS, LOCK) for path in sorted(output.glob(name))]
    if found := next((path for path in written + _plots_in(output) if path.exists() and not path.is_file()), None):
        kind = "a folder" if found.is_dir() else "no file on a disk"
        raise ValueError(
            f"output={str(output)!r}: {found} is {kind}, but a file of this name is written there. Move it."
        )


def _plots_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if PLOTS.fullmatch(path.name))


def _difference(old: Any, new: Any) -> str:
    """The first entry in which two settings differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *new]:
            if old.get(key) != new.get(key):
                return f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
    return f"it was {old!r} and is now {new!r}"

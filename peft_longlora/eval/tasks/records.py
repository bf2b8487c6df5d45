"""Tasks on given records: what `topics`, `multidoc` and `longqa` share."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_longlora.data.rows import read_rows
from peft_longlora.eval.tasks.prompts import PromptTask


def read_records(
    source: str | Path, check: Callable[[dict[str, Any]], None], what: str
) -> list[tuple[str, dict[str, Any]]]:
    """(name of data, record) of a .jsonl or .json file (an object a line, or one list), each also .gz, or of a folder.

    Data is called as its file, without endings; of files of one name their folders, and if need be endings, tell them
    apart.

    Raises:
        FileNotFoundError, ValueError: nothing there, no JSON, or a record that `check` refuses; names file and line.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder ({what}).")
    rows = []
    for file, place, row in read_rows(path):
        try:
            check(row if isinstance(row, dict) else {})
        except ValueError as error:
            raise ValueError(f"{place}: {error} Correct the record of {what}, or remove it.") from None
        rows.append((file, row))
    names = _names({file: None for file, _ in rows}, path)
    return [(names[file], row) for file, row in rows]


def _names(files: Iterable[Path], folder: Path) -> dict[Path, str]:
    """A name for each file, the shortest kind that is no other file's too."""
    files = list(files)
    within = {file: file.relative_to(folder).as_posix() if folder.is_dir() else file.name for file in files}
    kinds = [{file: stem(file.name) for file in files}, {file: stem(within[file]) for file in files}, within]
    counts = [Counter(kind.values()) for kind in kinds]
    return {
        file: next(
            (kind[file] for kind, count in zip(kinds, counts, strict=True) if count[kind[file]] == 1), within[file]
        )
        for file in files
    }


def check_texts(row: dict[str, Any], *fields: str) -> None:
    """Refuse a record in which one of the fields is no text.

    Raises: ValueError.
    """
    for key in fields:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"no {key!r}, or no text in it: {str(row.get(key))[:40]!r}.")


def check_lists(row: dict[str, Any], *fields: str) -> None:
    """Refuse a record in which one of the fields is no list of texts; an empty one is in every answer.

    Raises: ValueError.
    """
    for key in fields:
        texts = row.get(key)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"no {key!r}, or no list of texts in it: {str(texts)[:40]!r}.")


@dataclass
class RecordTask(PromptTask):
    """What tasks on records share. Subclasses give `check_record`.

    Args:
        source: a .jsonl or .json file, each also .gz, or a folder of them.
        samples: the first so many records of each file; None: all.
    """

    source: str = ""
    samples: int | None = None

    def __post_init__(self) -> None:
        self._rows: list[tuple[str, dict[str, Any]]] | None = None

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(name of the data, record), read once, no more than `samples` of a file."""
        if self._rows is None:
            counts: dict[str, int] = {}
            self._rows = []
            for name, row in read_records(self.source, self.check_record, self.name):
                counts[name] = counts.get(name, 0) + 1
                if self.samples is None or counts[name] <= self.samples:
                    self._rows.append((name, row))
        return self._rows

    def check_record(self, row: dict[str, Any]) -> None:
        """Refuse a record that cannot be asked or scored.

        Raises: ValueError: with what is wrong, as a sentence.
        """
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, Any]:
        """Only how prompts are made; which records were asked is in the samples' names."""
        return {"chat": self.chat}

    def data(self) -> dict[str, Any]:
        """The records that are used."""
        digest = hashlib.sha256()
        for _, row in self.rows():
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        name = stem(Path(self.source).name)
        return {"name": name, "sources": [name], "records": len(self.rows()), "sha256": digest.hexdigest()}


def stem(file: str) -> str:
    """A file's name without its endings: what its records are called in results.

    Example: "nq.v2.jsonl.gz" gives "nq.v2".
    """
    return file.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")

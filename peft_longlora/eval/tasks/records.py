"""The base of tasks on given records: `topics`, `multidoc` and `longqa`."""

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


def named_records(
    source: str | Path, check: Callable[[dict[str, Any]], None], what: str
) -> list[tuple[str, dict[str, Any]]]:
    """(name of data, record) of a .jsonl or .json file (an object a line, or one list), each also .gz, or of a folder.

    The name of the data is the file's name without endings. If several files have one name, the folder, and if
    necessary the ending, is added.

    Raises:
        FileNotFoundError: the path does not exist. ValueError: it is not JSON, or `check` refuses a record; the message
            names file and line.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder ({what}). Check the path.")
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
    """A name for each file: the shortest form that no other file has."""
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
    """Refuse a record in which a field is not text.

    Raises: ValueError.
    """
    for key in fields:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"no {key!r}, or it is not text: {str(row.get(key))[:40]!r}.")


def check_lists(row: dict[str, Any], *fields: str) -> None:
    """Refuse a record in which a field is not a list of texts. An empty text is refused too: every answer contains it.

    Raises: ValueError.
    """
    for key in fields:
        texts = row.get(key)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"no {key!r}, or it is not a list of texts: {str(texts)[:40]!r}.")


@dataclass
class RecordTask(PromptTask):
    """The base of tasks on records. Subclasses give `check_record`.

    Args:
        source: a .jsonl or .json file, each also .gz, or a folder of such files.
        samples: use only the first records of each file, this many; None: all.
    """

    source: str = ""
    samples: int | None = None

    def __post_init__(self) -> None:
        self._rows: list[tuple[str, dict[str, Any]]] | None = None

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """(name of the data, record) for at most `samples` records of each file; read once."""
        if self._rows is None:
            counts: dict[str, int] = {}
            self._rows = []
            for name, row in named_records(self.source, self.check_record, self.name):
                counts[name] = counts.get(name, 0) + 1
                if self.samples is None or counts[name] <= self.samples:
                    self._rows.append((name, row))
        return self._rows

    def check_record(self, row: dict[str, Any]) -> None:
        """Refuse a record that cannot be asked or scored.

        Raises: ValueError: a sentence that says what is wrong.
        """
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, Any]:
        """Only the settings of prompts; the samples' names say which records were used."""
        return {"chat": self.chat, "max_new_tokens": self.max_new_tokens}

    def data(self) -> dict[str, Any]:
        """The records that are used."""
        digest = hashlib.sha256()
        for _, row in self.rows():
            digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        name = stem(Path(self.source).name)
        return {"name": name, "sources": [name], "records": len(self.rows()), "sha256": digest.hexdigest()}


def stem(file: str) -> str:
    """A file's name without its endings, which is the name of its records in results.

    Example: "nq.v2.jsonl.gz" gives "nq.v2".
    """
    return file.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")

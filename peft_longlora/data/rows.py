"""Rows of data files and of datasets on the Hub, each with its place in the source.

Called by `documents` and by the evaluation. Imports `datasets` only to read from the Hub.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

Sources = str | Path | list[str | Path]
SUFFIXES = (".txt", ".jsonl", ".json")
BLANK = b"\xef\xbb\xbf \t\r\n"  # white space, and the mark that some editors begin a file with
NO_DATA = "If the file does not hold data, move it out of the folder."


def rows_of_sources(
    sources: Sources, split: str, config: str | None, text_field: str | None
) -> Iterator[tuple[str, Any]]:
    """(place, row) for every row of every source.

    Args:
        sources: files, folders, or ids of datasets on the Hub, which are streamed.
        split, config: of a dataset on the Hub.
        text_field: as `read_rows`.

    Raises:
        FileNotFoundError: a source does not exist. ValueError: as `read_rows`.
    """
    for source in [sources] if isinstance(sources, str | Path) else sources:
        path = Path(source)
        if not path.exists():
            yield from _hub_rows(str(source), split, config)
            continue
        for _, name, row in read_rows(path, text_field):
            yield name, row


def read_rows(path: Path, text_field: str | None = None) -> Iterator[tuple[Path, str, Any]]:
    """(file, place in the file, row) for a .jsonl or .json file, each also .gz, or for all such files of a folder.

    Args:
        text_field: the field name for the text of a .txt file; None: .txt files are refused.

    Raises:
        ValueError: the folder has no such file, a file is empty, or it is not JSON. The message names file and line.
    """
    for file in _files(path):
        number = 0
        with _named(str(file)):
            for number, (name, row) in enumerate(_file_rows(file, text_field), 1):  # noqa: B007
                yield file, name, row
        if not number:
            raise ValueError(f"{file}: nothing in it. Remove it.")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if _kind(path) not in SUFFIXES:
            raise ValueError(f"{path}: cannot read {path.suffix!r} files. Use {', '.join(SUFFIXES)}, each also .gz.")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    known = [file for file in files if _kind(file) in SUFFIXES]
    if not known:
        raise ValueError(f"{path}: holds no {', '.join(SUFFIXES)} file (each also .gz). Check the path.")
    if len(known) < len(files):
        others = [str(file.relative_to(path)) for file in files if file not in known]
        more = ", ..." if len(others) > 5 else ""
        logger.warning(f"{path}: reading {len(known)} files, not these {len(others)}: {', '.join(others[:5])}{more}")
    return known


def _kind(path: Path) -> str:
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


def _file_rows(path: Path, text_field: str | None) -> Iterator[tuple[str, Any]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if _kind(path) == ".txt":
            if text_field is None:
                raise ValueError(f"{path}: records come as .jsonl or .json, not as plain text. Convert them.")
            yield str(path), {text_field: file.read().decode("utf-8-sig")}
            return
        numbered, before, first = enumerate(file, 1), bytearray(), None
        for first in numbered:
            if first[1].strip(BLANK):
                break
            before += first[1]
        else:
            return
        # A list is read whole, because a part of a list is not valid JSON. Lines are read one by one.
        if first[1].strip(BLANK).startswith(b"["):
            for number, row in enumerate(_parse(bytes(before) + first[1] + file.read(), str(path)), 1):
                yield f"{path}, record {number}", row
            return
        for number, line in itertools.chain([first], numbered):
            if line.strip(BLANK):
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(raw: bytes, name: str) -> Any:
    """The value that JSON gives. An error is a ValueError that begins with `name`."""
    with _named(name):
        text = raw.decode("utf-8-sig")
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except RecursionError:
            raise ValueError(f"{name}: the JSON is nested too deeply. {NO_DATA}") from None
        except ValueError as error:  # Python turns no more than some thousand digits into a number
            digits = re.search(r"\d{1000,}", text)
            line = 1 + text.count("\n", 0, digits.start() if digits else 0)
            raise ValueError(f"{name}: a number is too long, at line {line} ({error}). {NO_DATA}") from None


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the file and line that cannot be decompressed, decoded or parsed."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{name}: damaged gzip file ({error}). Copy or download it again.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error.reason} at byte {error.start}). Convert it.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: not JSON ({error.msg} at line {error.lineno}, column {error.colno}). A file must hold one "
            f"object a line, or one list of objects. {NO_DATA}"
        ) from error


def _hub_rows(source: str, split: str, config: str | None) -> Iterator[tuple[str, Any]]:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) or _kind(Path(source)) in SUFFIXES:
        raise FileNotFoundError(f"{source}: no such file or folder.")
    from datasets import load_dataset

    try:
        rows = load_dataset(source, config, split=split, streaming=True)
    except OSError as error:
        raise FileNotFoundError(f"{source}: no file or folder here, and not read from the Hub: {error}") from error
    except (ValueError, RuntimeError) as error:  # no such split or configuration, or a script, which is never run
        raise ValueError(f"{source}: not read from the Hub: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{source} ({split}), record {number}", row

"""Rows of data files, source trees and datasets on the Hub, each with its place in the source.

Called by `documents` and by the evaluation. Imports `pyarrow` only for .parquet.
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

from peft_longlora.data.counts import Counts
from peft_longlora.data.folders import walk
from peft_longlora.data.hub_rows import NAME_ON_HUB, hub_rows
from peft_longlora.data.limits import Limits
from peft_longlora.data.pdf import read_pages, refuse_scan
from peft_longlora.data.repository import find_repositories, read_repository

logger = logging.get_logger(__name__)

Sources = str | Path | list[str | Path]
TEXTS = (".txt", ".md", ".pdf")  # one document a file
RECORDS = (".jsonl", ".json", ".parquet")
SUFFIXES = (*TEXTS, *RECORDS)
PACKED = (".pdf", ".parquet")  # compressed already, so never also .gz
# Files about a folder, not in its subject: README.md, LICENSE-MIT. "Sources of the Nile.txt" is a book.
ABOUT = re.compile(
    r"(readme|licen[cs]es?|copying|notices?|changelog|sources?|citations?|credits|authors|contributing)([._-].*)?$",
    re.IGNORECASE,
)
PARQUET_ROWS = 16  # read at once; a row may be a book
BLANK = b"\xef\xbb\xbf \t\r\n"  # white space, and the mark that some editors begin a file with
NO_FILE = "neither a file nor a folder (a pipe, or a device), and data are read several times. Save them as a file."
NO_DATA = "If the file does not hold data, move it out of the folder."


def rows_of_sources(
    sources: Sources,
    split: str,
    config: str | None,
    text_field: str | None,
    repositories: bool = False,
    counts: Counts | None = None,
) -> Iterator[tuple[str, Any]]:
    """(place, row) for every row of every source.

    Args:
        sources: files, folders, or ids of datasets on the Hub, which are streamed.
        split, config: of a dataset on the Hub.
        text_field: as `read_rows`.
        repositories: read folders as source trees; each repository is one row.
        counts: counts what is left out. None: it is logged.

    Raises:
        FileNotFoundError: a source does not exist. ValueError: as `read_rows`; there is no source; a source tree holds
            one that was read before.
    """
    seen: set[Path] = set()  # files and source trees that were read, and datasets by their ids
    for source in as_list(sources):
        path = Path(source)
        if not path.exists():
            if not NAME_ON_HUB.fullmatch(str(source)) or _kind(path) in SUFFIXES:
                raise FileNotFoundError(f"{source}: no such file or folder. Check the path.")
            if _is_new([path], seen, counts, "datasets"):
                yield from hub_rows(str(source), split, config)
        elif repositories and path.is_dir():
            yield from _repositories(path, text_field, counts, seen)
        else:
            for _, name, row in read_rows(path, text_field, counts, seen):
                yield name, row


def as_list(sources: Sources) -> list[str | Path]:
    """The sources as a list.

    Raises: ValueError: there is none.
    """
    found = [sources] if isinstance(sources, str | Path) else list(sources)
    if not found:
        raise ValueError("No source of data was given: the list is empty. Give files, folders, or ids of datasets.")
    return found


def read_rows(
    path: Path, text_field: str | None = None, counts: Counts | None = None, seen: set[Path] | None = None
) -> Iterator[tuple[Path, str, Any]]:
    """(file, place in the file, row) for a data file, or for all data files of a folder.

    Data files are .txt, .md, .jsonl and .json, each also .gz, .pdf and .parquet. In a folder, hidden files and files
    about the folder (README, LICENSE, SOURCES and the like) are left out.

    Args:
        text_field: the field name for the text of a .txt, .md or .pdf file. None: rows are records, which such files do
            not hold; in a folder they are left out, alone they are refused.
        counts: counts the files of a folder that are left out. None: they are logged.
        seen: the files that were read, which are not read again under another name or source; it grows.

    Raises:
        ValueError: the folder has no such file, a file is empty, or it is not JSON. The message names file and line.
        ImportError: pypdf or pyarrow is needed and missing.
    """
    seen = set() if seen is None else seen
    for file in _files(path, SUFFIXES if text_field else RECORDS, counts):
        if not _is_new(_around(file), seen, counts, "files"):
            continue
        number = 0
        with _named(str(file)):
            for number, (name, row) in enumerate(_file_rows(file, text_field), 1):  # noqa: B007
                yield file, name, row
        if not number:
            raise ValueError(f"{file}: nothing in it. Remove it.")


def source_files(path: Path, repositories: bool = False) -> list[Path]:
    """Every file on which the rows of a file or folder depend."""
    if path.is_file():
        return [path]
    if repositories:  # links in source trees are not followed
        return sorted(file for file in path.rglob("*") if file.is_file() and ".git" not in file.parts)
    return [file for file in walk(path)[0] if file.is_file()]


def _around(path: Path) -> list[Path]:
    """Where a file or folder really lies, and all folders around it: if one is a source tree, it holds the file."""
    place = path.resolve()
    return [place, *place.parents]


def _is_new(places: list[Path], seen: set[Path], counts: Counts | None, what: str) -> bool:
    """Whether the first of these places was not read before, by itself or within the others; else it is counted."""
    if seen.isdisjoint(places):
        seen.add(places[0])
        return True
    if counts is not None:
        counts.leave_out(f"{what} that are read already")
    else:
        logger.warning(f"{places[0]}: given twice, and read once.")
    return False


def _repositories(
    path: Path, text_field: str | None, counts: Counts | None, seen: set[Path]
) -> Iterator[tuple[str, Any]]:
    if text_field is None:
        raise ValueError(f"{path}: records do not come as source trees. Leave repositories=True out.")
    given = Counts() if counts is None else counts
    for root in find_repositories(path, given):
        places = _around(root)
        if inner := next((other for other in seen if places[0] in other.parents), None):
            raise ValueError(f"{root}: holds {inner}, which was read before and would be read twice. Give one of them.")
        if not _is_new(places, seen, counts, "source trees"):
            continue
        yield str(root), {text_field: read_repository(root, given)}
    if counts is None and given.left_out:
        text = ", ".join(f"{count} {reason}" for reason, count in given.left_out.items())
        logger.warning(f"{path}: reading {given.kept} files, not {text}.")


def _files(path: Path, suffixes: tuple[str, ...], counts: Counts | None) -> list[Path]:
    known = f"{', '.join(suffixes)} (each but {' and '.join(kind for kind in PACKED if kind in suffixes)} also .gz)"
    if path.is_file():
        if _kind(path) not in SUFFIXES:
            raise ValueError(f"{path}: cannot read {path.suffix!r} files. Use {known}.")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: {NO_FILE}")
    found, left_out = walk(path)
    for file in found:
        place = file.relative_to(path)
        if not file.is_file():
            left_out[file] = "pipes and devices" if file.exists() else "broken links"
        elif any(part.startswith(".") for part in place.parts):
            left_out[file] = "hidden files"
        elif ABOUT.match(file.name):
            left_out[file] = "files about the folder"
        else:
            left_out[file] = "" if _kind(file) in suffixes else f"{file.suffix or 'other'} files"
    files = [file for file, reason in left_out.items() if not reason]
    if not files:
        tree = " If it is a source tree, pass repositories=True." if suffixes is SUFFIXES else ""
        raise ValueError(f"{path}: holds no {known} file. Check the path.{tree}")
    others = [str(file.relative_to(path)) for file, reason in left_out.items() if reason]
    if counts is not None:
        for reason in filter(None, left_out.values()):
            counts.leave_out(reason)
    elif others:
        more = ", ..." if len(others) > 5 else ""
        logger.warning(f"{path}: reading {len(files)} files, not these {len(others)}: {', '.join(others[:5])}{more}")
    return files


def _kind(path: Path) -> str:
    """The suffix that says how a file is read; empty if it is compressed twice."""
    if path.suffix != ".gz":
        return path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return "" if inner in PACKED else inner


def _file_rows(path: Path, text_field: str | None) -> Iterator[tuple[str, Any]]:
    kind = _kind(path)
    if kind in TEXTS and text_field is None:
        raise ValueError(f"{path}: records come as .jsonl, .json or .parquet, not as plain text. Convert them.")
    if kind == ".pdf":
        yield str(path), {text_field: _pdf_text(path)}
        return
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if kind in TEXTS:
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


def _pdf_text(path: Path) -> str:
    """The text of all pages, with an empty line between two."""
    pages = read_pages(path, Limits())
    refuse_scan(path, pages)
    return "\n\n".join(filter(None, pages))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError("Reading .parquet needs pyarrow: pip install 'peft-longlora[trl]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=PARQUET_ROWS) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{path}, record {number}", row
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: damaged parquet file ({reason}). Copy or download it again.") from None


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

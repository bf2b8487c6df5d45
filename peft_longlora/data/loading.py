"""`load_rows`: one call from files, folders or a dataset's id to a Dataset of rows for a Trainer.

The rows are written to a file once, piece by piece, and read from it while the model trains, so neither the texts nor
the rows have to fit into memory. The file is used again if the same data is asked for with the same tokenizer. Imports
`datasets` and `pyarrow` inside functions, because they are extras.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import dataset_info
from transformers import PreTrainedTokenizerBase

from peft_longlora.data.arguments import check_count
from peft_longlora.data.counts import Counts
from peft_longlora.data.digests import SUFFIX, noting
from peft_longlora.data.documents import read_documents, read_records
from peft_longlora.data.records import tokenize_records
from peft_longlora.data.rows import Sources, as_list, source_files
from peft_longlora.data.windows import SHORTEST, to_windows

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = ("text", "records")
FORMAT = 4  # of the file with the rows; a new number makes old files useless
AT_ONCE = 64  # rows written at a time


def load_rows(
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    kind: Literal["text", "records"] = "text",
    split: str = "train",
    config: str | None = None,
    field: str = "text",
    skip_empty: bool = False,
    repositories: bool = False,
    too_long: Literal["truncate", "drop", "error"] = "truncate",
    pack: bool = False,
    max_rows: int | None = None,
    quiet: bool = False,
    cache: str | Path | None = None,
) -> Dataset:
    """Rows of at most `length` tokens, for TRL's SFTTrainer or a plain Trainer. Logs one line on what they hold.

    With kind="text", every token of every document is in exactly one row; a file that is given twice is read once. The
    first token of a row is read, but nothing predicts it. `.info.description` of the result is the same line:
    documents, tokens, rows, and what was left out.

    Args:
        sources: files, folders (.txt, .md, .pdf, .jsonl, .json, .parquet), source trees, or ids of datasets on the
            Hub; as for `read_documents`.
        tokenizer: the model's.
        length: tokens of a row, at most.
        kind: "text": continued pre-training. "records": instruction tuning with a loss on answers only, on records as
            `read_records` reads them.
        split: of a dataset on the Hub.
        config: of a dataset on the Hub, if it has several.
        field: the name of the text field.
        skip_empty: skip an empty document with a warning, instead of raising an error.
        repositories: folders are source trees; each repository is one document.
        too_long: for records longer than a row, as `tokenize_records`.
        pack: fill rows with the ends of several documents, for a plain Trainer (`to_windows` says more). Leave it False
            for SFTTrainer with packing=True and max_length=length, which fills rows itself.
        max_rows: stop after so many rows, for a dataset that is larger than what you train on. The line says so.
        quiet: do not log the line, because you print it.
        cache: the folder for the file with the rows. None: "longlora-rows" in the cache of `datasets`.

    Returns:
        A Dataset with "input_ids" and "labels", and "position_ids" if the rows are packed.

    Raises:
        FileNotFoundError, ValueError: as `read_documents`, `read_records` and `to_windows`; an unknown kind.
        ImportError: datasets is not installed.

    Examples:
        >>> rows = load_rows("books/", tokenizer, 32768)
        >>> args = SFTConfig(max_length=32768, packing=True, packing_strategy="bfd_split")
        >>> SFTTrainer(model, args=args, train_dataset=rows).train()
    """
    try:
        from datasets import Dataset
        from datasets import config as settings
    except ImportError:
        raise ImportError("load_rows needs datasets: pip install 'peft-longlora[trl]'") from None
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown. Use {' or '.join(map(repr, KINDS))}.")
    if kind == "records" and (pack or repositories):
        raise ValueError(f"pack={pack} and repositories={repositories} are for kind='text'. Leave them out.")
    sources = list(map(str, as_list(sources)))
    where = dict(split=split, config=config)
    read = dict(field=field, skip_empty=skip_empty, repositories=repositories) if kind == "text" else {}
    if max_rows is not None:
        check_count("max_rows", max_rows, 1, "of rows")
    length = check_count("length", length, SHORTEST if kind == "text" else 2, "of tokens in a row")
    made = dict(pack=pack) if kind == "text" else dict(too_long=too_long)
    folder = Path(cache or Path(settings.HF_DATASETS_CACHE) / "longlora-rows")
    key = _key(sources, tokenizer, dict(where, **read, **made, kind=kind, length=length, max_rows=max_rows))
    path = folder / f"{key}.arrow"
    texts = path.with_suffix(SUFFIX)
    if path.exists():
        noted = json.loads(path.with_suffix(".json").read_text())
        digest = noted.pop("digest")
        counts = Counts(**{**noted, "is_quiet": quiet})
        counts.report()
    else:
        counts = Counts(is_quiet=quiet)
        folder.mkdir(parents=True, exist_ok=True)
        # The rows get their name last, so that all of them is there if they are.
        with _replacing(path) as part, _replacing(texts) as noted, noted.open("w", encoding="utf-8") as file:
            if kind == "text":
                documents = noting(read_documents(sources, **where, **read, counts=counts), file)
                rows = to_windows(documents, tokenizer, length, counts, **made)
            else:
                records = noting(read_records(sources, **where, counts=counts), file)
                rows = tokenize_records(records, tokenizer, length, **made, counts=counts)
            digest = _write(islice(rows, max_rows), part, counts, max_rows)
            with _replacing(path.with_suffix(".json")) as held:
                held.write_text(json.dumps({**asdict(counts), "digest": digest}))
    dataset = Dataset.from_file(str(path))
    dataset.info.description = str(counts)
    # A Trainer's `map` keeps the info of a Dataset, so its rows still lead to the notes.
    dataset.info.download_checksums = {
        name: {"num_bytes": None, "checksum": value}
        for name, value in (("rows", digest), ("texts", str(texts.absolute())))
    }
    return dataset


def digest_of(rows: Dataset) -> str:
    """A digest of all tokens and labels of `load_rows`, which took it when it wrote them."""
    return rows.info.download_checksums["rows"]["checksum"]


def _key(sources: list[str], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """A name for the rows: it changes with any file's place, size or time, with the tokenizer, and with the options."""
    files = []
    for source in sources:
        path = Path(source)
        if path.exists():
            stats = ((file, file.stat()) for file in source_files(path, options.get("repositories", False)))
            # The system sets st_ctime_ns at every change, and no program can set it back; copies may keep the others.
            files.append([[str(f.absolute()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for f, s in stats])
        else:
            files.append([source, _commit(source)])
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    return _digest([FORMAT, files, words, tokenizer.eos_token_id, tokenizer.chat_template, options])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _commit(name: str) -> str:
    """The commit of a dataset on the Hub; if the Hub does not say it, a name that no other rows have."""
    try:
        return dataset_info(name, timeout=10).sha
    except Exception:  # what is wrong is said when the dataset is read
        return os.urandom(8).hex()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A place to write at, which then gets the name `path`. Several machines may share the folder."""
    part = path.with_suffix(f".{os.urandom(8).hex()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write(rows: Iterator[dict[str, list[int]]], path: Path, counts: Counts, max_rows: int | None) -> str:
    """Write rows into a file that `Dataset.from_file` reads. Returns their digest.

    Raises: ValueError: there is no row.
    """
    import pyarrow

    writer, digest = None, hashlib.sha256()
    while batch := list(islice(rows, AT_ONCE)):
        if writer is None:
            schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int32())) for name in batch[0]])
            writer = pyarrow.ipc.new_stream(str(path), schema)
        for row in batch:
            for name, numbers in row.items():
                digest.update(f"{name} {len(numbers)}:".encode() + array("i", numbers).tobytes())
        writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
    if writer is None:
        raise ValueError(f"No row is left to train on: {counts}. Use longer rows, or other data.")
    writer.close()
    if counts.rows == max_rows:
        counts.is_stopped = True
        counts.report()
    return digest.hexdigest()

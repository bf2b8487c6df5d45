"""`load_rows`: whatever the files, every token once, in rows for either trainer; the line says what is left out."""

import json
import os
import re
from collections import Counter

import datasets
import numpy as np
import pytest

from peft_longlora.data import load_rows
from peft_longlora.data import loading as loading_module
from peft_longlora.data.loading import digest_of
from tests.helpers.chat_models import make_pdf

TEXTS = {
    "a.txt": "one two three\n" * 90,
    "b.md": "# four\n\nfive " * 40,
    "c.jsonl": "six seven " * 25,
    "e.parquet": "8 " * 200,
}
RECORDS = [{"instruction": f"Add {n} and {n}.", "input": "", "output": f"{2 * n}"} for n in range(5)]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "books"
    root.mkdir()
    for name, text in TEXTS.items():
        if name.endswith(".jsonl"):
            (root / name).write_text(json.dumps({"text": text}) + "\n")
        elif name.endswith(".parquet"):
            datasets.Dataset.from_list([{"text": text, "n": 1}]).to_parquet(str(root / name))
        else:
            (root / name).write_text(text)
    (root / "d.pdf").write_bytes(make_pdf(["A page with words.", "", "Another page."]))
    (root / "cover.jpg").write_bytes(b"\xff\xd8")
    (root / "README.md").write_text("about the books")
    return root


@pytest.fixture
def load(tokenizer, tmp_path):
    return lambda sources, length=64, **options: load_rows(
        sources, tokenizer, length, cache=tmp_path / "cache", **options
    )


def documents_of(folder, tokenizer) -> list[tuple[int, ...]]:
    """The tokens of every document, from the texts that were written and the tokenizer alone."""
    texts = [*TEXTS.values(), "A page with words.\n\nAnother page."]
    return [(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts]


def test_every_token_of_every_kind_of_file_once(folder, load, tokenizer):
    rows = load(folder)
    documents = documents_of(folder, tokenizer)
    ends = [tuple(ids[-5:]) for ids in documents]
    found, current = [], []
    for row in rows:
        assert 2 <= len(row["input_ids"]) <= 64 and row["labels"] == row["input_ids"]
        current += row["input_ids"]
        if tuple(current[-5:]) in ends:
            found.append(tuple(current))
            current = []
    assert Counter(found) == Counter(documents) and not current
    total = sum(map(len, documents))
    assert f"5 read, {total:,} tokens -> {len(rows)} rows" in rows.info.description
    assert "left out: 1 .jpg files, 1 files about the folder" in rows.info.description


def test_packed_rows_fill_the_window_and_keep_documents_apart(folder, load, tokenizer):
    rows = load(folder, pack=True)
    documents = documents_of(folder, tokenizer)
    total = sum(map(len, documents))
    assert len(rows) == -(-total // 64) or len(rows) == -(-total // 64) + 1  # the ends are packed, not spread
    pieces = []
    for row in rows:
        starts = [i for i, place in enumerate(row["position_ids"]) if place == 0]
        for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:stop] == list(range(stop - start))
            assert row["labels"][start:stop] == [-100, *row["input_ids"][start + 1 : stop]]
            pieces.append(tuple(row["input_ids"][start:stop]))
    cut = [ids[i : i + 64] for ids in documents for i in range(0, len(ids), 64)]
    assert Counter(pieces) == Counter(cut)


def test_rows_are_kept_until_a_file_changes(folder, load, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(loading_module, "to_windows", None)  # not called again
    again = load(folder)
    assert again.to_list() == first.to_list() and again.info.description == first.info.description
    monkeypatch.undo()
    assert len(load(folder, length=32)) > len(first)
    (folder / "a.txt").write_text(TEXTS["a.txt"] + "more")
    assert load(folder).to_list() != first.to_list()


def test_an_edit_that_keeps_size_and_time_gives_new_rows(folder, load):
    """As `rsync -t` or an archive's restored times leave it. A digest tells which rows they are."""
    path = folder / "a.txt"
    before, about = load(path), path.stat()
    path.write_text(TEXTS["a.txt"].replace("two", "six"))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    after = load(path)
    assert path.stat().st_size == about.st_size and path.stat().st_mtime_ns == about.st_mtime_ns
    assert after.to_list() != before.to_list() and digest_of(after) != digest_of(before)
    path.write_text(TEXTS["a.txt"])
    assert load(path).to_list() == before.to_list() and digest_of(load(path)) == digest_of(before)


@pytest.mark.parametrize("kind", ["text", "records"])
@pytest.mark.parametrize("length", [64.0, "64", None, True, np.bool_(True), 1, -5])
def test_a_length_that_is_no_whole_number_is_refused(load, folder, kind, length):
    with pytest.raises(
        ValueError, match=f"length={re.escape(repr(length))} must be a whole number of tokens in a row, [23] or more"
    ):
        load(folder, length, kind=kind)


def test_rows_of_records(load, tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    rows = load(tmp_path / "a.jsonl", kind="records")
    assert len(rows) == 5
    for record, row in zip(RECORDS, rows, strict=True):
        answer = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() == record["output"]
    pairs = [{"prompt": record["instruction"], "completion": record["output"]} for record in RECORDS]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert load(tmp_path / "b.jsonl", kind="records").to_list() == rows.to_list()


def test_a_dataset_of_the_hub(load, monkeypatch, tokenizer):
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "one two"}, {"text": "three"}]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    rows = load(["someone/books", "someone/books"])
    assert rows.info.description.endswith("left out: 1 datasets that are read already")
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ("one two", "three")]
    assert [row["input_ids"] for row in rows] == expected


def test_reading_stops_at_a_number_of_rows(load, monkeypatch):
    def endless():
        while True:
            yield {"text": "one two three " * 40}

    stream = datasets.IterableDataset.from_generator(endless)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    rows = load("someone/books", max_rows=7)
    assert len(rows) == 7 and "left out: everything after these rows" in rows.info.description
    with pytest.raises(ValueError, match="max_rows=0 must be a whole number of rows, 1 or more"):
        load("someone/books", max_rows=0)
    with pytest.raises(ValueError, match="max_rows='7' must be a whole number of rows"):
        load("someone/books", max_rows="7")


def test_refused(folder, load, tmp_path):
    with pytest.raises(ValueError, match="kind='chat' is unknown"):
        load(folder, kind="chat")
    with pytest.raises(ValueError, match="are for kind='text'"):
        load(folder, kind="records", pack=True)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load("missing.jsonl")
    (folder / "f.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"f\.parquet: damaged parquet file"):
        load(folder)
    assert not list((tmp_path / "cache").glob("*.part"))
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "word " * 90, "output": "x"}) + "\n")
    with pytest.raises(
        ValueError, match=r"No row is left to train on: 1 read.*left out: 1 long records \(103 tokens\)"
    ):
        load(tmp_path / "long.jsonl", kind="records", too_long="drop")
    with pytest.raises(ValueError, match="No source of data was given: the list is empty"):
        load([])
    (tmp_path / "empty.jsonl").write_text('{"text": null}\n{"text": " "}\n')
    with pytest.raises(ValueError, match=r"No row is left to train on: 0 read.*left out: 2 empty texts\."):
        load(tmp_path / "empty.jsonl", skip_empty=True)


def test_a_file_that_is_given_twice_is_read_once(folder, load, tokenizer):
    (folder / "z.txt").symlink_to(folder / "a.txt")
    (folder.parent / "link.txt").symlink_to(folder / "b.md")
    rows = load([folder, folder / "a.txt", str(folder), folder.parent / "link.txt"])
    assert sum(len(row["input_ids"]) for row in rows) == sum(map(len, documents_of(folder, tokenizer)))
    assert f"left out: {1 + 1 + 6 + 1} files that are read already" in rows.info.description


def test_source_trees_that_hold_one_another_are_read_once(load, tmp_path):
    for name in ("tree/a.py", "tree/inner/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"print({name!r})\n")
    tree = load(tmp_path / "tree", repositories=True)
    assert load([tmp_path / "tree", tmp_path / "tree/inner"], repositories=True).to_list() == tree.to_list()
    with pytest.raises(ValueError, match=r"tree: holds .*inner, which was read before and would be read twice"):
        load([tmp_path / "tree/inner", tmp_path / "tree"], repositories=True)


def test_texts_without_an_end_are_said(load, folder, tokenizer, tmp_path):
    assert "without a token that ends them" not in load(folder / "a.txt").info.description
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    ends = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    for template, count in ((ends, 5), (ends.replace("{% endfor", "</s>{% endfor"), 0)):
        tokenizer.chat_template = template
        said = load(tmp_path / "a.jsonl", kind="records").info.description
        assert said.endswith("write it in the template") == bool(count) and (
            f"; {count} texts without" in said
        ) == bool(count)
    tokenizer.chat_template = tokenizer.eos_token = None
    text = load(folder / "a.txt")
    assert [token for row in text for token in row["input_ids"]] == tokenizer(TEXTS["a.txt"])["input_ids"]
    assert "; 1 texts without a token that ends them" in text.info.description
    with pytest.raises(ValueError, match="The tokenizer has neither a chat template nor an end-of-seq"):
        load(tmp_path / "a.jsonl", kind="records")

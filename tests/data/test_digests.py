"""Training data is found in held-out data whatever file, place or shape it comes in, and other data is not."""

import gzip
import json

import pytest

from peft_longlora.data import check_held_out, load_rows
from peft_longlora.data.digests import notes_of, refuse_shared

TEXTS = ["The first text.\n", "A second one.", "And a third.\r\n"]
TURNS = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "Ann."}]


@pytest.fixture
def load(tokenizer, tmp_path):
    return lambda *sources, **options: load_rows(list(sources), tokenizer, 64, cache=tmp_path / "cache", **options)


@pytest.fixture
def books(tmp_path):
    (tmp_path / "books").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / f"books/{number}.txt").write_text(text)
    return tmp_path / "books"


def test_a_document_of_the_training_data_is_found_in_every_form(books, load, tmp_path):
    (tmp_path / "copy.md").write_text(TEXTS[1])
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(TEXTS[2].encode()))
    (tmp_path / "lines.jsonl").write_text(
        json.dumps({"text": "Another."}) + "\n" + json.dumps({"text": TEXTS[0].strip()})
    )
    (tmp_path / "link").symlink_to(books)
    (tmp_path / "other.txt").write_text("The first text. And more.")
    trained = load(books)
    for name in ("copy.md", "packed.txt.gz", "lines.jsonl", "link", "books/1.txt"):
        with pytest.raises(ValueError, match=rf"data holds '.*{name}.*', which is training data: '.*books/\d\.txt' is"):
            check_held_out(trained, load(tmp_path / name))
    with pytest.raises(ValueError, match=r"lines\.jsonl:2', .*/0\.txt' is the same text \(1 of 2 held-out texts are\)"):
        check_held_out(load(books), load(tmp_path / "lines.jsonl"))  # the rows of the cache know it too
    check_held_out(trained, load(tmp_path / "other.txt"))
    check_held_out(load(books, max_rows=1), load(books / "2.txt"))  # was not read, so it is not trained


def test_a_record_is_found_in_every_shape(load, tmp_path):
    shapes = [
        {"instruction": "Who is it?", "output": "Ann."},
        {"prompt": "Who is it?", "completion": "Ann. "},
        {"messages": TURNS},
    ]
    for number, row in enumerate(shapes):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "Who is it?", "completion": "Bob."}))
    first, *others, other = (load(tmp_path / f"{name}.jsonl", kind="records") for name in (0, 1, 2, "other"))
    for rows in others:
        with pytest.raises(ValueError, match="which is training data"):
            check_held_out(first, rows)
    check_held_out(first, other)


def test_rows_that_were_made_otherwise_are_not_known(books, load):
    def never():
        raise AssertionError("the held-out data need not be read")

    for rows in (None, [], load(books).to_list()):
        refuse_shared(rows, never, "held")
    kept = load(books).map(lambda row: row).select([0])
    assert len(notes_of(kept).read_text().splitlines()) == 3
    check_held_out(kept, None)
    notes_of(kept).unlink()
    refuse_shared(kept, never, "held")

"""Files that no data are in, or that begin with a mark of their encoding: pipes, broken links, byte order marks."""

import gzip
import json
import os
import threading
from pathlib import Path

import pytest

from peft_longlora.chat import read_document
from peft_longlora.data.documents import read_documents, read_records
from peft_longlora.eval import LongQA

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


def in_time(ask):
    """What `ask()` raises. A pipe that is opened waits for somebody to write, for ever."""
    found = []

    def work() -> None:
        try:
            ask()
        except Exception as error:
            found.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(20)
    assert found, "it waits for the pipe" if worker.is_alive() else "it took the pipe"
    return found[0]


READERS = {
    "documents": lambda path: list(read_documents(path)),
    "records": lambda path: list(read_records(path)),
    "chat": read_document,
    "prompts of longqa": lambda path: LongQA("none.json", prompts=str(path)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz", "a.parquet", "a"])
def test_a_pipe_is_refused_by_name_and_nobody_waits(reader, name, tmp_path):
    os.mkfifo(tmp_path / name)
    error = in_time(lambda: READERS[reader](tmp_path / name))
    assert isinstance(error, ValueError) and str(tmp_path / name) in str(error)


@pytest.mark.parametrize("reader", ["documents", "records"])
def test_a_pipe_in_a_folder_is_left_out_and_named(reader, tmp_path, log):
    row = {"text": "a", "instruction": "b", "output": "c"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    os.mkfifo(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").symlink_to("nowhere")
    assert len(READERS[reader](tmp_path)) == 1
    assert "not these 2: b.jsonl, c.jsonl" in log.text


def test_a_folder_of_pipes_holds_no_data(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    assert "holds no" in str(in_time(lambda: list(read_documents(tmp_path))))


def put(path: Path, text: str) -> Path:
    raw = b"\xef\xbb\xbf" + text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


ROW = {"text": "Größe", "instruction": "Wie?", "output": "So."}
FORMS = {
    "a.txt": "Größe",
    "a.md": "Größe",
    "a.txt.gz": "Größe",
    "a.jsonl": json.dumps(ROW) + "\n",
    "b.jsonl": "\n\n" + json.dumps(ROW),
    "a.json": json.dumps([ROW]),
    "a.json.gz": " " + json.dumps([ROW]),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_byte_order_mark_is_no_part_of_the_text(name, tmp_path):
    path = put(tmp_path / name, FORMS[name])
    assert [row["text"] for row in read_documents(path)] == ["Größe"]
    if "json" in name:
        assert [row["instruction"] for row in read_records(path)] == ["Wie?"]
    elif not name.endswith(".gz"):
        assert read_document(path).text == "Größe"


def test_prompts_may_begin_with_a_byte_order_mark(tmp_path):
    templates = {"qasper": "{context} {input}"}
    assert LongQA("none.json", prompts=str(put(tmp_path / "p.json", json.dumps(templates))))._templates == templates


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", FORMS)
def test_other_encodings_are_named(name, encoding, tmp_path):
    path = tmp_path / name
    raw = FORMS[name].encode(encoding)
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(ValueError, match=rf"{name}.*not (UTF-8|JSON)"):
        list(read_documents(path))

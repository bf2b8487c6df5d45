"""Documents and records: what is read, what is refused, and that the message says where it stands."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import datasets
import pytest

from peft_longlora.data import Counts, documents, to_windows
from peft_longlora.data.documents import read_documents, read_records
from tests.helpers.paths import REAL_DATA

RECORD = {"instruction": "What is the colour?", "input": "", "output": "Blue."}


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TEXTS = ["one\ntwo\n", "Größe 長い", "last"]
ROWS = [{"text": text} for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(*ROWS)),
        ("a.jsonl.gz", lines(*ROWS)),
        ("a.jsonl", "\ufeff" + lines(*ROWS).replace("\n", "\r\n\r\n").rstrip()),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json.gz", "\ufeff" + json.dumps(ROWS, ensure_ascii=False)),
        ("a.json", lines(*ROWS)),
        ("a.jsonl", json.dumps(ROWS)),
    ],
    ids=["lines", "lines-gz", "lines-bom-blank-crlf", "list", "list-gz-bom-utf8", "lines-in-json", "list-in-jsonl"],
)
def test_json_documents(tmp_path, name, content):
    assert [d["text"] for d in read_documents(write(tmp_path / name, content))] == TEXTS


def test_folders_and_text_files(tmp_path, log):
    write(tmp_path / "b.txt", "second\r\nline")
    write(tmp_path / "a" / "x.txt.gz", "\ufefffirst")
    write(tmp_path / "c.jsonl", lines({"body": "third"}))
    write(tmp_path / "README.md", "not text to train on")
    documents = list(read_documents([tmp_path, str(tmp_path / "b.txt")], field="body"))
    assert [d["text"] for d in documents] == ["first", "second\r\nline", "third"]
    assert [Path(d["source"]).name for d in documents] == ["x.txt.gz", "b.txt", "c.jsonl:1"]
    assert "README.md" in log.text and "3 files" in log.text and "b.txt: given twice, and read once" in log.text


def test_lines_are_streamed(tmp_path):
    """Only as much is read as is asked for: the damage in line 3 shows when line 3 is read."""
    documents = read_documents(write(tmp_path / "a.jsonl", lines(*ROWS[:2]) + "{broken\n"))
    assert [next(documents)["text"], next(documents)["text"]] == TEXTS[:2]
    with pytest.raises(ValueError, match=r"a\.jsonl:3: not JSON"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(*ROWS) + '{"text": "cut o', r"a\.jsonl:4: not JSON \(Unterminated string"),
        ("a.jsonl", "plain words\n", r"a\.jsonl:1: not JSON .* one object a line, or one list"),
        ("a.json", '[{"text": "a"},\n{"text": "b"', r"a\.json: not JSON .* at line 2, column"),
        ("a.json", '{\n  "text": "a"\n}', r"a\.json:1: not JSON"),
        ("a.jsonl", lines({"text": "a"}, {"body": "b"}), r"a\.jsonl:2: no 'text'. The fields are \['body'\]"),
        ("a.json", json.dumps([{"text": "a"}, {"text": None}]), r"a\.json, record 2: 'text' is null. Remove"),
        ("a.json", json.dumps([{"text": "a"}, {"text": 7}]), r"a\.json, record 2: 'text' is a int \('7'\)"),
        ("a.jsonl", lines({"text": "a"}, "b"), r"a\.jsonl:2: a str, not an object"),
        ("a.jsonl", lines({"text": "a"}, {"text": " \n"}), r"a\.jsonl:2: 'text' is empty"),
        ("a.txt", " \n", r"a\.txt: 'text' is empty"),
        ("a.txt.gz", "", r"a\.txt\.gz: 'text' is empty"),
        ("a.jsonl", "", r"a\.jsonl: nothing in it"),
        ("a.jsonl", "\n \n", r"a\.jsonl: nothing in it"),
        ("a.json", "[]", r"a\.json: nothing in it"),
        ("a.txt", "Größe".encode("latin-1"), r"a\.txt: not UTF-8 \(.* at byte 2\)"),
        ("a.jsonl", lines(*ROWS).encode() + b'{"text": "\xff"}', r"a\.jsonl:4: not UTF-8"),
        ("a.jsonl", '{"text": "a \\ud83d"}', r"a\.jsonl:1: 'text' holds half of a surrogate pair"),
        ("a.csv", "text\na", r"a\.csv: cannot read '\.csv' files"),
        ("a.jsonl", lines(*ROWS) + "[" * 99999, r"a\.jsonl:4: the JSON is nested too deeply"),
        ("a.jsonl", lines(*ROWS) + '{"a":' * 99999, r"a\.jsonl:4: the JSON is nested too deeply"),
        ("a.json", "[" * 99999, r"a\.json: the JSON is nested too deeply"),
        ("a.jsonl", lines(*ROWS) + '{"text": ' + "9" * 5000 + "}", r"a\.jsonl:4: a number is too long, at line 1"),
        ("a.json", '[{"text": "a"},\n{"text": ' + "9" * 5000 + "}]", r"a\.json: a number is too long, at line 2"),
        ("a.json", "\n" * 300 + "[1", r"a\.json: not JSON .* at line 301"),
        ("a.jsonl", "\n" * 300 + "{1", r"a\.jsonl:301: not JSON"),
    ],
)  # fmt: skip
def test_bad_documents_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_documents(write(tmp_path / name, content)))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("blank", [b"", b"\n", b" " * 100, b"\r\n" * 5000, b"\xef\xbb\xbf\n\n \t"])
@pytest.mark.parametrize("form", [json.dumps, lambda rows: json.dumps(rows, indent=1), lambda rows: lines(*rows)])
def test_blank_bytes_before_the_first_record_change_nothing(tmp_path, form, blank, suffix):
    path = write(tmp_path / f"a.json{suffix}", blank + form(ROWS).encode())
    assert [d["text"] for d in read_documents(path)] == TEXTS


@pytest.mark.parametrize("content", ['{\n  "license": "cc0"\n}\n', '{"license": "cc0"}\n'])
def test_a_file_about_the_documents_is_named_and_said_to_be_none(tmp_path, content):
    write(tmp_path / "a.txt", TEXTS[0])
    write(tmp_path / "metadata.json", content)
    with pytest.raises(ValueError, match=r"metadata\.json:1: no.* does not hold data, move it out of the folder"):
        list(read_documents(tmp_path))


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(lines(*ROWS).encode())
    for number, content in enumerate((whole[:-12], b"no gzip at all", whole[:-8] + b"\0" * 8)):
        path = tmp_path / f"{number}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{number}\.jsonl\.gz: damaged gzip file"):
            list(read_documents(path))


def test_skip_empty_says_so(tmp_path, log):
    path = write(tmp_path / "a.jsonl", lines(ROWS[0], {"text": ""}, ROWS[2]))
    assert [d["text"] for d in read_documents(path, skip_empty=True)] == [TEXTS[0], TEXTS[2]]
    assert "a.jsonl:2: 'text' is empty, left out" in log.text


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no \.txt"):
        list(read_documents(tmp_path / "empty"))
    for missing in (tmp_path / "books", tmp_path / "a.txt", "missing.jsonl"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            list(read_documents(missing))
    with pytest.raises(FileNotFoundError, match="someone/books: no file or folder here, and not read from the Hub"):
        list(read_documents("someone/books"))  # the tests run offline


def test_hub_datasets_are_streamed_and_checked(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": ""}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read_documents("someone/books", split="validation", config="long")
    assert next(documents) == {"text": "a", "source": "someone/books (validation), record 1"}
    with pytest.raises(ValueError, match=r"someone/books \(validation\), record 2: 'text' is empty"):
        next(documents)
    assert calls == [(("someone/books", "long"), {"split": "validation", "streaming": True})]


def test_records(tmp_path):
    rows = [
        RECORD,
        {"instruction": "b", "output": "c", "file": "x"},
        {"instruction": "d", "input": None, "output": "e"},
    ]
    expected = [("What is the colour?", "", "Blue."), ("b", "", "c"), ("d", "", "e")]
    for path in (write(tmp_path / "a.jsonl.gz", lines(*rows)), write(tmp_path / "a.json", json.dumps(rows))):
        records = list(read_records(path))
        assert [(r["instruction"], r["input"], r["output"]) for r in records] == expected
    assert records[1]["source"] == f"{tmp_path / 'a.json'}, record 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": None}, "the fields are .'input', 'instruction'.. Records are"),
        ({"output": " "}, "'output' is empty"),
        ({"output": ["Blue."]}, "'output' is a list"),
        ({"instruction": None}, r"the fields are \['input', 'output'\]\. Records are"),
        ({"instruction": ""}, "'instruction' is empty"),
        ({"input": 3}, "'input' is a int"),
    ],
)
def test_bad_records_are_named(tmp_path, change, message):
    bad = {key: value for key, value in {**RECORD, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {message}"):
        list(read_records(write(tmp_path / "a.jsonl", lines(RECORD, bad))))
    with pytest.raises(ValueError, match=rf"a\.json, record 2: {message}"):
        list(read_records(write(tmp_path / "a.json", json.dumps([RECORD, bad]))))


def test_records_in_trls_forms(tmp_path):
    turns = [("system", "Be brief."), ("user", "Why?"), ("assistant", "So.")]
    chat = [{"role": role, "content": content} for role, content in turns]
    rows = [{"prompt": "Why?", "completion": "So."}, {"messages": chat[1:]}]
    records = list(read_records(write(tmp_path / "a.jsonl", lines(*rows))))
    assert [(r["instruction"], r["input"], r["output"]) for r in records] == [("Why?", "", "So.")] * 2
    several, names = [*chat, *chat[1:]], {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[turn["role"]], "value": turn["content"]} for turn in several]
    rows = [{"messages": several}, {"conversations": shared}, {"messages": chat, "tools": None}]
    records = list(read_records(write(tmp_path / "a.jsonl", lines(*rows))))
    assert [r["messages"] for r in records] == [several, several, chat] and records[1]["source"].endswith("a.jsonl:2")
    tool = {"role": "tool", "content": "42"}
    call = {"role": "assistant", "content": "I ask.", "tool_calls": [{"function": {"name": "f"}}]}
    for bad, message in (
        (chat[:2], r"'messages' has the roles \['system', 'user'\]"),
        (chat[2:], r"'messages' has the roles \['assistant'\]"),
        ([*chat, chat[2]], r"'messages' has the roles .*Questions and their answers are read: \(system,\) user"),
        ([*chat[1:], tool, chat[2]], r"'messages' has the roles .*'tool', .*Tools are not read"),
        ([chat[1], call], r"'messages'\[1\]: holds 'tool_calls', which is not read"),
        ([chat[1], {**chat[2], "reasoning_content": "Hm."}], r"'messages'\[1\]: holds 'reasoning_content'"),
        ([chat[1], {**chat[2], "weight": 0}], r"'messages'\[1\]: is marked as not to be trained"),
        ([], r"'messages' has the roles \[\]"),
        (["Why?", "So."], r"'messages' has the roles \[None, None\]"),
        ([chat[1], {"role": "assistant", "content": None}], r"'messages'\[1\]: 'content' is null. Fill it in"),
        ([{"role": "user", "content": " "}, chat[2]], r"'messages'\[0\]: 'content' is empty"),
        ("Why?", "'messages' is a str .'Why.'., not a list"),
    ):
        with pytest.raises(ValueError, match=rf"b\.jsonl:1: {message}"):
            list(read_records(write(tmp_path / "b.jsonl", lines({"messages": bad}))))
    for bad, message in (
        ({"prompt": 1, "completion": "b"}, "'prompt' is a int"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": "a"}, "the fields are .'prompt'.. Records are"),
        ({"question": "a"}, "the fields are .'question'.. Records are .*messages.*conversations"),
        ({"prompt": "a", "completion": None}, "'completion' is null. Fill it in, or remove the record"),
        ({"messages": None}, "'messages' is null"),
    ):
        with pytest.raises(ValueError, match=rf"b\.jsonl:1: {message}"):
            list(read_records(write(tmp_path / "b.jsonl", lines(bad))))


def test_records_are_no_plain_text(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: records come as \.jsonl, \.json or \.parquet"):
        list(read_records(write(tmp_path / "a.txt", "text")))


def test_a_folder_of_records_may_hold_text_beside_them(tmp_path, log):
    """Records with their sources in a .md file are usual; text files alone are not records."""
    write(tmp_path / "a.jsonl", lines({"prompt": "a", "completion": "b"}))
    for name in ("SOURCES.md", "notes.txt"):
        write(tmp_path / name, "text")
    assert len(list(read_records(tmp_path))) == 1
    assert "reading 1 files, not these 2: SOURCES.md, notes.txt" in log.text
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds no \.jsonl, \.json, \.parquet .* file\. Check the path\.$"):
        list(read_records(tmp_path))


def test_files_about_a_folder_are_not_read_as_documents(tmp_path):
    about = [
        "README.md",
        "readme.zh.txt",
        "LICENSE-MIT.txt",
        "LICENCE.md",
        "SOURCES.md",
        "NOTICE.txt",
        "CITATION.txt.gz",
    ]
    read = ["Sources of the Nile.txt", "Authors and books.txt", "book.txt"]
    for name in about + read:
        write(tmp_path / name, name)
    assert sorted(document["text"] for document in read_documents(tmp_path)) == sorted(read)


def test_local_files_need_neither_datasets_nor_trl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "trl", None)
    module = runpy.run_path(documents.__file__, run_name="data_alone")
    assert len(list(module["read_documents"](write(tmp_path / "a.jsonl", lines(*ROWS))))) == 3


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no ../shared/data: real books and records, not in the repository")
def test_real_data(tokenizer):
    records = list(read_records(REAL_DATA / "longqa"))
    assert len(records) == 250
    books = read_documents(REAL_DATA / "books" / "validation")
    counts = Counts()
    rows = list(to_windows([next(books)], tokenizer, 4096, counts))
    assert counts.documents == counts.longer == 1 and counts.tokens == sum(len(row["input_ids"]) for row in rows)


def test_a_dataset_that_breaks_in_the_middle_is_named(monkeypatch):
    """datasets 4.7 raised KeyError: 'file' for records of which some lack a field."""

    def broken(*args, **kwargs):
        yield {"text": "a"}
        raise KeyError("file")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(
        ValueError, match=r"me/data \(train\), behind record 1: not read from the Hub: KeyError: 'file'"
    ):
        list(read_documents("me/data"))

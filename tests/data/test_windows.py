"""peft_longlora.data: what is read, what is refused and how it says so, and what becomes of the tokens."""

import gzip
import json
import runpy
import sys
from functools import cache
from itertools import accumulate, chain
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from peft_longlora.data import documents
from peft_longlora.data.documents import read_documents, read_records
from peft_longlora.data.windows import Counts, to_windows, tokenize_record, tokenize_records
from tests.helpers.configs import tiny_llama_config
from tests.helpers.paths import EMBEDDED, REAL_DATA

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
RECORD = {"instruction": "What is the colour?", "input": "", "output": "Blue."}


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture
def log(caplog):
    """What the package logs; transformers' loggers do not propagate by themselves."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# -- reading -----------------------------------------------------------------------------------------------------

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
    assert [d["text"] for d in documents] == ["first", "second\r\nline", "third", "second\r\nline"]
    assert [Path(d["source"]).name for d in documents] == ["x.txt.gz", "b.txt", "c.jsonl:1", "b.txt"]
    assert "README.md" in log.text and "3 files" in log.text


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
        ("a.json", json.dumps([{"text": "a"}, {"text": None}]), r"a\.json, record 2: no 'text'"),
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
    ],
)  # fmt: skip
def test_bad_documents_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        list(read_documents(write(tmp_path / name, content)))


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
        ({"output": None}, "no 'output'. The fields are"),
        ({"output": " "}, "'output' is empty"),
        ({"output": ["Blue."]}, "'output' is a list"),
        ({"instruction": None}, "no 'instruction'"),
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


def test_records_are_no_plain_text(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt: records come as \.jsonl or \.json"):
        list(read_records(write(tmp_path / "a.txt", "text")))


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


# -- tokens ------------------------------------------------------------------------------------------------------


@cache
def shared_tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.integers(1, 60), min_size=1, max_size=5), length=st.integers(3, 20))
def test_windows_hold_every_token_once(words, length):
    tokenizer = shared_tokenizer()
    documents = [{"text": "x " * n, "source": f"d{n}"} for n in words]
    expected = [tokenizer(d["text"])["input_ids"] + [tokenizer.eos_token_id] for d in documents]
    counts = Counts()
    rows = [row["input_ids"] for row in to_windows(documents, tokenizer, length, counts)]
    assert list(chain(*rows)) == list(chain(*expected))
    assert all(2 <= len(row) <= length for row in rows)
    assert len(rows) == sum(-(-len(ids) // length) for ids in expected) == counts.rows
    assert (counts.documents, counts.tokens) == (len(words), sum(map(len, expected)))
    assert counts.longer == sum(len(ids) > length for ids in expected)
    ends = set(accumulate(map(len, expected)))
    assert ends <= set(accumulate(map(len, rows)))  # no row holds two documents


def test_windows_refuse(tokenizer):
    with pytest.raises(ValueError, match="length=2 must be 3 tokens or more"):
        list(to_windows([], tokenizer, 2))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"a\.txt: it has 1 token and needs 2"):
        list(to_windows([{"text": "", "source": "a.txt"}], tokenizer, 4))


@pytest.mark.parametrize("chat_template", [None, CHAT_TEMPLATE], ids=["llama-2", "chat"])
@pytest.mark.parametrize("text_input", ["", "Sky over the sea."])
def test_tokens_and_labels_are_those_of_trl(tmp_path, tokenizer, chat_template, text_input):
    """SFTTrainer, given the same prompt and answer as columns, prepares the same row."""
    from trl import SFTConfig, SFTTrainer

    tokenizer.chat_template = chat_template
    record = {**RECORD, "input": text_input}
    user = f"{RECORD['instruction']}\n{text_input}" if text_input else RECORD["instruction"]
    if chat_template:
        row = {"prompt": [{"role": "user", "content": user}]}
        row["completion"] = [{"role": "assistant", "content": "Blue."}]
    else:
        row = {"prompt": f"[INST] {user} [/INST]", "completion": " Blue."}
    trainer = SFTTrainer(
        LlamaForCausalLM(tiny_llama_config(vocab_size=len(tokenizer))),
        SFTConfig(output_dir=tmp_path, max_length=None, report_to="none", bf16=False, completion_only_loss=True),
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    expected = trainer.train_dataset[0]
    ours = tokenize_record(record, tokenizer)
    assert ours == {"input_ids": expected["input_ids"], "labels": expected["labels"]}
    answer = [label for label in ours["labels"] if label != -100]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "Blue."


def long_records():
    question = " What is the answer?"
    return [
        {**RECORD, "source": "r:1"},
        {"instruction": "Start. " + "filler " * 300 + question, "output": "Forty-two.", "source": "r:2"},
        {"instruction": "Start. " + "filler " * 100 + question, "output": "Forty-three.", "source": "r:3"},
    ]


def test_truncation_keeps_both_ends_and_is_counted(tokenizer, log):
    counts = Counts()
    rows = list(tokenize_records(long_records(), tokenizer, 64, counts=counts))
    whole = [tokenize_record(record, tokenizer) for record in long_records()]
    assert rows[0] == whole[0]
    for row, full, record in zip(rows[1:], whole[1:], long_records()[1:], strict=True):
        assert len(row["input_ids"]) == len(row["labels"]) == 64
        text = tokenizer.decode(row["input_ids"])
        assert "Start." in text and text.endswith(f"What is the answer? [/INST] {record['output']}<eos>")
        assert [x for x in row["labels"] if x != -100] == [x for x in full["labels"] if x != -100]
    lengths = [len(row["input_ids"]) for row in whole]
    assert (counts.documents, counts.rows, counts.tokens, counts.longer) == (3, 3, sum(lengths), 2)
    assert (counts.cut_tokens, counts.dropped, counts.names) == (sum(lengths[1:]) - 128, 0, ["r:2", "r:3"])
    assert f"2 longer than the window (r:2, r:3): {counts.cut_tokens} tokens cut out" in log.text


def test_dropping_is_counted(tokenizer, log):
    counts = Counts()
    rows = list(tokenize_records(long_records(), tokenizer, 64, too_long="drop", counts=counts))
    lengths = [len(tokenize_record(record, tokenizer)["input_ids"]) for record in long_records()]
    assert len(rows) == counts.rows == 1
    assert (counts.dropped, counts.dropped_tokens, counts.cut_tokens) == (2, sum(lengths[1:]), 0)
    assert f"(r:2, r:3): 0 tokens cut out, 2 ({sum(lengths[1:])} tokens) dropped" in log.text


def test_too_long_refusals(tokenizer):
    with pytest.raises(
        ValueError, match=r"r:2: \d+ tokens, of which \d+ are the answer's, do not fit in max_length=64"
    ):
        list(tokenize_records(long_records(), tokenizer, 64, too_long="error"))
    long_answer = {**RECORD, "output": "word " * 100, "source": "r:9"}
    with pytest.raises(ValueError, match=r"r:9: .* do not fit in max_length=64"):
        list(tokenize_records([long_answer], tokenizer, 64))
    with pytest.raises(ValueError, match="too_long='cut' is unknown"):
        list(tokenize_records([], tokenizer, 64, too_long="cut"))

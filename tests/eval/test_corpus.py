"""Windows: the original's formula, every token once, and memory that does not grow with the corpus."""

import gzip
import json
import random
import tracemalloc

import pytest
from transformers.utils import logging

from peft_longlora.eval.corpus import Corpus
from tests.helpers.memory import forget, highest, needs_linux


def letters(texts: list[str]) -> list[list[int]]:
    return [[ord(c) for c in text] for text in texts]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    rng = random.Random(0)
    for i, n in enumerate((700, 40, 1, 1500, 33, 260)):
        (tmp_path / f"{i}.txt").write_text("".join(rng.choices("abcdefgh", k=n)))
    return Corpus(tmp_path)


@pytest.mark.parametrize(("length", "stride"), [(64, 256), (100, 7), (512, 256), (64, 64), (30, 100)])
def test_longlora_windows_are_those_of_the_original(corpus, length, stride):
    [data] = letters(["".join(d["text"] for d in corpus.documents())])
    starts = list(range(0, len(data) - length, stride))  # get_as_batch of the original's eval.py
    starts.pop()
    windows = list(corpus.stream_windows(letters, length, stride))
    assert [w.start for w in windows] == starts
    for window, start in zip(windows, starts, strict=True):
        assert window.inputs.tolist() == data[start : start + length]
        assert window.targets.tolist() == data[start + 1 : start + length]
    assert [w.number for w in windows] == list(range(len(starts)))


def test_a_longlora_window_belongs_to_the_document_it_starts_in(corpus):
    ends, total = [], 0
    for document in corpus.documents():
        total += len(document["text"])
        ends.append(total)
    for window in corpus.stream_windows(letters, 50, 11):
        assert window.document == next(i for i, end in enumerate(ends) if window.start < end)


@pytest.mark.parametrize(("length", "stride"), [(64, 32), (64, 64), (64, 1), (100, 99), (2000, 1000), (2, 1)])
def test_document_windows_score_every_token_but_the_first_once(corpus, length, stride):
    texts = letters([d["text"] for d in corpus.documents()])
    scored = [[] for _ in texts]
    for window in corpus.document_windows(letters, length, stride):
        assert len(window.inputs) == len(window.targets) <= length
        text = texts[window.document]
        assert window.inputs.tolist() == text[window.start : window.start + len(window.inputs)]
        for i in range(window.first, len(window.targets)):
            place = window.start + 1 + i
            assert window.targets[i] == text[place]
            scored[window.document].append(place)
        assert window.is_short == (len(text) <= length)
        if window.number and len(text) > window.start + length:
            assert window.first == length - stride, "all but new tokens are context"
    assert scored == [list(range(1, len(text))) for text in texts]


def test_example_of_the_docstring(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    windows = list(Corpus(tmp_path).document_windows(lambda texts: [[int(c) for c in text] for text in texts], 4, 2))
    assert [w.inputs.tolist() for w in windows] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8]]
    assert [w.targets[w.first :].tolist() for w in windows] == [[1, 2, 3, 4], [5, 6], [7, 8], [9]]


def test_progress_is_the_part_of_the_text_up_to_a_window(corpus):
    """Within documents too: the time that is left is worked out from it. Here a token is a character."""
    sizes = [len(d["text"]) for d in corpus.documents()]
    for window in corpus.document_windows(letters, 64, 32):
        read = sum(sizes[: window.document]) + window.start + len(window.inputs) + 1
        assert window.progress == pytest.approx(read / sum(sizes))
    for window in corpus.stream_windows(letters, 64, 32):  # is known to be one once a stride more has been read
        assert window.start + 64 <= window.progress * sum(sizes) + 1e-9 <= window.start + 64 + 32


def test_too_little_text_for_the_original_protocol_is_said(corpus):
    with pytest.raises(ValueError, match=r"2534 tokens in all give no window of 2400 .* more than 2656"):
        list(corpus.stream_windows(letters, 2400))


def test_summary(tmp_path):
    (tmp_path / "a.txt").write_text("xyz")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "uv"}\n{"text": "w"}\n')
    summary = Corpus(tmp_path).summary()
    assert (summary.documents, summary.characters) == (3, 6)
    (tmp_path / "a.txt").write_text("xyZ")
    assert Corpus(tmp_path).summary().sha256 != summary.sha256
    assert str(tmp_path) not in json.dumps(summary.entry()), "results.json names no path of this machine"


@pytest.mark.parametrize(("limit", "sizes"), [(2**21, [6]), (800, [3, 1, 2]), (1, [1] * 6)])
def test_documents_become_tokens_in_batches(corpus, monkeypatch, limit, sizes):
    monkeypatch.setattr("peft_longlora.eval.corpus.BATCH_CHARACTERS", limit)
    seen = []

    def encode(texts: list[str]) -> list[list[int]]:
        seen.append(len(texts))
        return letters(texts)

    tokens = [document.ids.tolist() for document in corpus.tokens(encode)]
    assert seen == sizes
    assert tokens == letters([d["text"] for d in corpus.documents()])


@needs_linux
@pytest.mark.parametrize("windows", ["document_windows", "stream_windows"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, windows):
    def words(texts: list[str]) -> list[list[int]]:
        return [list(range(len(text) // 5)) for text in texts]

    def peak(documents: int) -> int:
        path = tmp_path / f"{documents}.jsonl"
        line = json.dumps({"text": "word " * 40_000}) + "\n"
        path.write_text(line * documents)
        corpus = Corpus(path)
        before = forget()
        seen = sum(1 for _ in getattr(corpus, windows)(words, 4096, 2048))
        assert seen > 18 * documents
        return highest() - before

    peak(10)  # what is read ahead is filled, and the memory for it stays with the process
    # 30 MB of text, 6 million tokens in 24 MB: neither stays behind.
    assert peak(150) < 8 * 2**20


@pytest.mark.parametrize("windows", ["document_windows", "stream_windows"])
def test_python_keeps_nothing_of_a_document(tmp_path, windows, monkeypatch):
    monkeypatch.setattr("peft_longlora.eval.corpus.BATCH_CHARACTERS", 20_000)
    sizes = (1000, 5000, 15_000)  # characters; the largest fill a batch

    def words(texts: list[str]) -> list[list[int]]:
        return [list(range(1000, 1000 + len(text) // 5)) for text in texts]

    def peak(rounds: int) -> int:
        path = tmp_path / f"{rounds}.jsonl"
        path.write_text("".join(json.dumps({"text": "word " * (size // 5)}) + "\n" for size in sizes) * rounds)
        corpus = Corpus(path)
        tracemalloc.start()
        seen = sum(1 for _ in getattr(corpus, windows)(words, 512, 256))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seen > 12 * rounds
        return most

    few = peak(5)
    assert peak(50) < few + 100_000, "135 documents more, 190,000 tokens: not even a byte of each"
    assert few < 1_000_000, "a few batches: 20 KB of text, 4,200 tokens and a list of them"


def test_repositories_and_what_is_left_out(tmp_path, caplog):
    for name in ("one/.git/config", "one/b.py", "one/a.py", "two/.git/config", "two/uv.lock", "two/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    logging.enable_propagation()
    try:
        corpus = Corpus(tmp_path, repositories=True)
        assert [len(document["text"].split("===")) for document in corpus.documents()] == [5, 3]
        assert corpus.summary().documents == 2
    finally:
        logging.disable_propagation()
    assert "2 documents; left out: 1 lock files" in caplog.text

"""Perplexity: a bigram model against its closed form, with both protocols, by position, and where it is no number."""

import itertools
import math
import random

import pytest
import torch
from transformers import AutoTokenizer

from peft_longlora.eval.corpus import Corpus
from peft_longlora.eval.report.cells import collect_cells
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.perplexity import Perplexity
from tests.helpers.answering_models import Bigrams, letter_tokenizer
from tests.helpers.paths import EMBEDDED

P = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.05, 0.05, 0.45, 0.45]])
TEXTS = ["".join(random.Random(i).choices("abcd", k=n)) for i, n in enumerate((150, 90, 40, 333))]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    return Corpus(tmp_path)


@pytest.fixture
def subject() -> Subject:
    return Subject.of(Bigrams(P), letter_tokenizer())


def loss(before: str, after: str) -> float:
    return -math.log(P["abcd".index(before), "abcd".index(after)])


def measure(task, subject):
    return collect_cells(item.measure() for item in task.items(subject))


def value(cells, group=None, length=64):
    cell = next(c for c in cells.values() if (c.name[3], c.name[4], c.name[5]) == ("perplexity", length, group))
    return cell.sums()[1].value()


@pytest.mark.parametrize("stride", [None, 0, 64, 10])
def test_documents_protocol_is_the_closed_form(corpus, subject, stride):
    """exp of minus the sum over pairs of letters of n(i, j) log P[i, j], over their number: no window changes it."""
    pairs = [loss(a, b) for text in TEXTS for a, b in itertools.pairwise(text)]
    cells = measure(Perplexity(corpus, [16, 64], stride=stride and min(stride, 16)), subject)
    for length in (16, 64):
        assert value(cells, length=length) == pytest.approx(math.exp(sum(pairs) / len(pairs)), rel=1e-5)


def test_longlora_protocol_is_the_originals_mean_of_means(corpus, subject):
    """eval.py: windows every 256 tokens (here 20), each the mean of its own tokens' losses; 2.71828 ** mean."""
    stream, length = "".join(TEXTS), 64
    starts = list(range(0, len(stream) - length, 20))
    starts.pop()
    means = []
    for start in starts:
        window = stream[start : start + length]
        means.append(sum(loss(a, b) for a, b in itertools.pairwise(window)) / (length - 1))
    cells = measure(Perplexity(corpus, [length], "longlora", stride=20), subject)
    assert value(cells) == pytest.approx(2.71828 ** (sum(means) / len(means)), rel=1e-4)
    assert Perplexity(corpus, [length], "longlora").parameters["stride"] == 256


def test_buckets_hold_the_tokens_at_their_positions(corpus, subject):
    sums = {(0, 8): [], (8, 20): [], (20, 64): []}
    for text in TEXTS:
        for place, (a, b) in enumerate(itertools.pairwise(text)):
            position = place % 64  # windows that do not overlap
            next(s for (low, high), s in sums.items() if low <= position < high).append(loss(a, b))
    cells = measure(Perplexity(corpus, [64], stride=64, buckets=[8, 20]), subject)
    for (low, high), losses in sums.items():
        assert value(cells, f"{low}-{high}") == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_bits_per_byte_are_those_of_the_text_but_its_first_letter(corpus, subject):
    """In closed form: minus the sum of log2 P over all pairs of letters, over the letters that are predicted."""
    bits = sum(loss(a, b) / math.log(2) for text in TEXTS for a, b in itertools.pairwise(text))
    letters = sum(len(text) - 1 for text in TEXTS)
    for options in (dict(), dict(stride=0), dict(stride=10)):
        cells = measure(Perplexity(corpus, [16, 64], **options), subject)
        for length in (16, 64):
            [cell] = [c for c in cells.values() if (c.name[3], c.name[4]) == ("bits_per_byte", length)]
            assert cell.sums()[1].value() == pytest.approx(bits / letters, rel=1e-5)
    for options in (dict(max_windows=1), dict(protocol="longlora", stride=8)):
        cells = measure(Perplexity(corpus, [16], **options), subject)
        assert {cell.name[3] for cell in cells.values()} == {"perplexity"}, "not every document is scored whole"


def test_bytes_are_those_of_utf8_and_a_first_special_token_is_no_text(tmp_path):
    text = "größer 😀\n" * 9
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.pad_token_id = None

    class Even(Bigrams):
        """Every token is as likely as every other."""

    size = len(tokenizer)
    subject = Subject.of(Even(torch.full((size, size), 1 / size)), tokenizer)
    ids = subject.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    [cell] = [c for c in measure(Perplexity(Corpus(tmp_path), [16]), subject).values() if c.name[3] == "bits_per_byte"]
    want = (len(ids) - 1) * math.log2(size) / len(text.encode())
    assert cell.sums()[1].value() == pytest.approx(want, rel=1e-5)


def test_documents_shorter_than_the_window_are_scored_and_named(corpus, subject):
    task = Perplexity(corpus, [100])
    cells = measure(task, subject)
    assert len(next(iter(cells.values())).units) == 4
    assert task.notes == [
        "perplexity, 100 tokens: 2 of 4 documents are shorter than the window and were scored whole (1.txt, 2.txt)."
    ]


def test_a_limit_of_one_window_is_said_as_one(corpus, subject):
    task = Perplexity(corpus, [32], stride=32, max_windows=1)
    assert (
        len(list(task.items(subject))) == 4 and "only the first window of each document was measured" in task.notes[0]
    )


def test_a_limit_counts_windows_of_each_document(corpus, subject):
    task = Perplexity(corpus, [32], stride=32, max_windows=2)
    items = list(task.items(subject))
    left_out = sum(max(0, -(-(len(text) - 1) // 32) - 2) for text in TEXTS)
    limit = f"only the first 2 windows of each document were measured, and {left_out} were left out."
    assert task.notes == [f"perplexity, 32 tokens, documents: {limit}"]
    assert [item.key.rsplit("/", 2)[1:] for item in items] == [
        [f"{document:06d}", f"{window:06d}"] for document in range(4) for window in range(2)
    ]


def test_a_loss_that_is_no_number_is_named_with_document_and_position(tmp_path):
    bad = Subject.of(Bigrams(P), letter_tokenizer())
    with torch.no_grad():
        bad.model.embeddings.weight[1] = float("nan")  # what is predicted after a "b" is no number
    clean, (document, place) = TEXTS[0].replace("b", "a"), (1, TEXTS[1].index("b", 10))
    texts = [clean, TEXTS[1][:10].replace("b", "c") + TEXTS[1][10:]]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    task = Perplexity(Corpus([tmp_path / "0.txt", tmp_path / "1.txt"]), [8], stride=8)
    with pytest.raises(ValueError) as error:
        measure(task, bad)
    expected = f"document {document} (1.txt), token {place + 1}, position {place % 8 + 1} of a window of 8"
    assert "The loss is nan in" in str(error.value) and expected in str(error.value)
    task = Perplexity(Corpus([tmp_path / "0.txt", tmp_path / "1.txt"]), [8], "longlora", stride=4)
    place += len(clean)
    start = next(start for start in range(0, len(clean) + 90, 4) if place - start < 7)  # the first window to score it
    expected = f"token {place + 1} of all documents, in the window that begins in {int(start >= len(clean))}.txt, "
    with pytest.raises(ValueError, match=f"{expected}position {place - start + 1} of a window of 8"):
        measure(task, bad)


def test_a_length_above_the_window_is_marked(corpus, subject):
    assert subject.window == 32
    cells = measure(Perplexity(corpus, [32, 64]), subject)
    assert {cell.name[4]: cell.beyond_window for cell in cells.values()} == {32: False, 64: True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lengths=[1]), "window of 1 tokens"),
        (dict(lengths=[64], stride=65), "stride=65 must be 0 to the window's 64"),
        (dict(lengths=[64], protocol="pg19"), "protocol='pg19' is unknown"),
    ],
)
def test_settings_that_mean_nothing_are_refused(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        Perplexity(corpus, **options)

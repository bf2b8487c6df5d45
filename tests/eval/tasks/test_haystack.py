"""Haystacks of books: what a prompt of one length hides in depends on no other length."""

import random

import pytest

from peft_longlora.eval.corpus import Corpus
from peft_longlora.eval.tasks.haystack import Books
from peft_longlora.eval.tasks.passkey import Passkey
from peft_longlora.eval.tasks.ruler import NO_BOOKS, TASKS, Ruler
from tests.helpers.answering_models import scripted_subject


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Forty documents, so that each length needs another number of them."""
    folder, rng = tmp_path_factory.mktemp("books"), random.Random(0)
    for n in range(40):
        words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(4, 9))) for _ in range(300)]
        (folder / f"{n:02d}.txt").write_text(" ".join(words) + ".")
    return Corpus(folder)


def texts(task, length: int) -> list[str]:
    subject = scripted_subject(str)
    return [question.make(subject).text for question in task.questions() if question.length == length]


@pytest.mark.parametrize("kind", ["needle", *sorted(set(TASKS) - NO_BOOKS)])
def test_a_prompt_is_one_text_whatever_is_asked_beside_it(corpus, kind):
    def task(lengths: list[int]):
        if kind == "needle":
            return Passkey(lengths=lengths, depths=[0.5], seeds=2, books=Books(corpus))
        return Ruler(kind=kind, lengths=lengths, samples=2, books=Books(corpus))

    length = 3000
    alone = texts(task([length]), length)
    assert alone == texts(task([length, 9000]), length) == texts(task([9000, length]), length)
    assert len(set(alone)) == 2 and alone != texts(task([length + 500]), length + 500)


def test_words_are_those_of_the_first_documents_with_ten_characters_a_token(corpus):
    documents = [document["text"] for document in corpus.documents()]
    for length in (10, 400, 1000, 20):
        characters, words = 0, []
        for text in documents:
            words += text.split()
            characters += len(text)
            if characters >= 10 * length:
                break
        assert Books(corpus).up_to(length).words == words
    books = Books(corpus)
    assert [len(books.up_to(n).words) for n in (1000, 10)] == [len(Books(corpus).up_to(n).words) for n in (1000, 10)]
    assert len(books.up_to(10**6).words) == 300 * len(documents), "all there are"


def test_text_goes_on_from_the_beginning(tmp_path):
    (tmp_path / "a.txt").write_text("one two\nthree four")
    excerpt = Books(Corpus(tmp_path)).up_to(1)
    assert excerpt.text(3, 0.5) == "three four one" and excerpt.text(9) == "one two three four " * 2 + "one"
    assert excerpt.text(0, 0.9) == ""


def test_more_than_the_longest_prompt_is_refused(corpus):
    with pytest.raises(ValueError, match="up to 100 tokens hold too little for 101"):
        Books(corpus, 100).up_to(101)

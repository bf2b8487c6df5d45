"""Items made ahead: the same ones in the same order, errors where they belong, and no thread left behind."""

import threading

import pytest

from peft_longlora.data.prefetch import prefetch


def test_items_come_in_order():
    assert list(prefetch(iter(range(1000)))) == list(range(1000))
    assert list(prefetch(iter(()))) == []


def test_no_more_than_asked_for_are_made_ahead():
    made = []

    def items():
        for i in range(50):
            made.append(i)
            yield i

    ahead = prefetch(items(), size=3)
    for i in ahead:
        assert len(made) <= i + 1 + 3 + 1, "the one at hand, three that wait, and one in the making"


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("broken file")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken file"):
        next(ahead)


def test_stopping_early_ends_the_thread_and_closes_the_items():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    ahead = prefetch(items())
    next(ahead)
    ahead.close()
    assert threading.active_count() == before
    assert closed.wait(5), "files that the items read are closed"

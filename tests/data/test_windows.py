"""Windows hold every token once, and no row holds two documents."""

from functools import cache
from itertools import accumulate, chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from peft_longlora.data import Counts, to_windows
from tests.helpers.paths import EMBEDDED


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
    with pytest.raises(ValueError, match="length=2 must be a whole number of tokens in a row, 3 or more"):
        list(to_windows([], tokenizer, 2))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"a\.txt: it has 1 token and needs 2"):
        list(to_windows([{"text": "", "source": "a.txt"}], tokenizer, 4))

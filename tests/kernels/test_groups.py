"""Where groups start and end, against the contract's worked examples and a token-by-token definition."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_longlora.kernels.cuts import tensors_of
from peft_longlora.kernels.groups import (
    find_documents,
    plan_from_segment_ids,
    plan_groups,
    runs_of_equal_pieces,
    split_document,
    split_heads,
)

EVEN = st.sampled_from([2, 4, 6, 8])


@st.composite
def segment_rows(draw, max_batch=3, max_documents=4, max_document=11) -> torch.Tensor:
    """(B, S) segment ids: documents one after the other, with padding left, right, both or nowhere."""
    rows = []
    for _ in range(draw(st.integers(1, max_batch))):
        lengths = draw(st.lists(st.integers(1, max_document), max_size=max_documents))
        left, right = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        rows.append([0] * left + [n + 1 for n, length in enumerate(lengths) for _ in range(length)] + [0] * right)
    length = max(1, *map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def group_of(position: int, length: int, group_size: int, shift: int) -> int:
    """The contract, for one token: its group, by its position in a document of `length` tokens."""
    if length <= group_size:
        return 0
    return 0 if position < shift else (position - shift) // group_size + bool(shift)


@pytest.mark.parametrize(
    ("length", "group_size", "shift", "expected"),
    [
        (10, 4, 0, [4, 4, 2]),
        (10, 4, 2, [2, 4, 4]),
        (8, 4, 2, [2, 4, 2]),
        (9, 4, 2, [2, 4, 3]),
        (5, 4, 0, [4, 1]),
        (5, 4, 2, [2, 3]),
        (4, 4, 0, [4]),
        (4, 4, 2, [4]),  # a document that fits stays dense, shifted heads included
        (1, 4, 2, [1]),
        (3, 2, 1, [1, 2]),
    ],
)
def test_split_document_examples(length, group_size, shift, expected):
    assert split_document(length, group_size, shift) == expected


@given(length=st.integers(1, 60), group_size=EVEN, shifted=st.booleans())
def test_split_document_follows_the_definition(length, group_size, shifted):
    shift = group_size // 2 if shifted else 0
    groups = [group_of(t, length, group_size, shift) for t in range(length)]
    assert split_document(length, group_size, shift) == [groups.count(g) for g in sorted(set(groups))]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "straight"),
    [(4, 4, (2, 2)), (32, 8, (16, 4)), (9, 3, (3, 1)), (8, 1, (4, 0)), (9, 1, (4, 0)), (1, 1, (0, 0)), (5, 5, (2, 2))],
)
def test_split_heads(heads, kv_heads, straight):
    """KV heads from H_kv // 2 on are shifted with their readers; one KV head serves both halves."""
    assert split_heads(heads, kv_heads) == straight


@given(ids=segment_rows())
def test_find_documents_reads_the_runs_of_every_row(ids):
    expected, length = [], ids.shape[1]
    for row, values in enumerate(ids.tolist()):
        for column, value in enumerate(values):
            if column == 0 or values[column - 1] != value:
                expected.append([row * length + column, 0, value])
            expected[-1][1] += 1
    assert [list(document) for document in find_documents(ids)] == expected


def test_equal_numbers_in_two_rows_are_two_documents():
    assert find_documents(torch.tensor([[1, 1], [1, 1]])) == [(0, 2, 1), (2, 2, 1)]


def test_plan_of_the_worked_example():
    groups = plan_groups(1, 10, 4)
    assert groups.straight == (0, 4, 8, 10)
    assert groups.shifted == (0, 2, 6, 10)
    assert groups.is_split and groups.max_length == 4 and groups.padding is None


def test_plan_without_segment_ids_cuts_each_row():
    groups = plan_groups(2, 5, 4)
    assert groups.straight == (0, 4, 5, 9, 10)
    assert groups.shifted == (0, 2, 5, 7, 10)


@pytest.mark.parametrize(
    ("pattern", "straight", "shifted"),
    [("s2", (0, 4, 6), (0, 2, 6)), ("local", (0, 4, 6), (0, 4, 6)), ("full", (0, 6), (0, 6))],
)
def test_patterns(pattern, straight, shifted):
    groups = plan_groups(1, 6, 4, pattern)
    assert (groups.straight, groups.shifted) == (straight, shifted)
    assert groups.is_split == (straight != shifted)


@given(ids=segment_rows(), group_size=EVEN, pattern=st.sampled_from(["s2", "local", "full"]))
@settings(max_examples=150)
def test_plan_puts_tokens_together_exactly_as_defined(ids, group_size, pattern):
    """Two tokens that are no padding share a piece if and only if they share row, document and group."""
    groups = plan_from_segment_ids(ids, group_size, pattern)
    batch, length = ids.shape
    shift = group_size // 2 if pattern == "s2" else 0
    for boundaries, by in ((groups.straight, 0), (groups.shifted, shift)):
        assert boundaries[0] == 0 and boundaries[-1] == batch * length
        assert all(a < b for a, b in pairwise(boundaries))
        assert max(b - a for a, b in pairwise(boundaries)) <= groups.max_length
        keys = []
        for row, values in enumerate(ids.tolist()):
            for column, value in enumerate(values):
                start, tokens = values.index(value), values.count(value)
                group = 0 if pattern == "full" else group_of(column - start, tokens, group_size, by)
                keys.append((row, value, group) if value else None)
        for start, end in pairwise(boundaries):
            assert len(set(keys[start:end])) == 1, "a piece holds tokens of two groups"
            is_padding = keys[start] is None
            assert (start in groups.padding_starts) == is_padding
            assert is_padding or end == batch * length or keys[end] != keys[start], "a group is cut in two"
    if (ids == 0).any():
        assert torch.equal(groups.padding, ids == 0)
    else:
        assert groups.padding is None


def test_long_padding_makes_no_long_piece():
    """Padding is cut small: a kernel that computes it must not pay for its length squared."""
    ids = torch.zeros(2, 1000, dtype=torch.long)
    ids[0, :10] = 1
    groups = plan_from_segment_ids(ids, 4)
    assert groups.max_length <= 128
    assert groups.straight[:4] == (0, 4, 8, 10) and groups.straight[-1] == 2000


def test_tensors_hold_the_boundaries_and_are_made_once():
    groups = plan_from_segment_ids(torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 0]]), 2)
    cpu = torch.device("cpu")
    layout, cu_seqlens = tensors_of(groups, cpu)
    straight, shifted = [0, 1, 3, 4, 6, 8, 9, 11, 12], [0, 1, 2, 4, 6, 7, 9, 11, 12]
    assert (groups.straight, groups.shifted) == (tuple(straight), tuple(shifted))
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == straight + shifted
    assert layout.tolist() == [9, 9, 6, *straight, *shifted, 0, 1, 4, 6, 11, 12]
    assert tensors_of(groups, cpu)[1] is cu_seqlens


def test_runs_of_equal_pieces():
    assert runs_of_equal_pieces((0, 2, 6, 10), frozenset()) == [(0, 2, 1), (2, 4, 2)]
    assert runs_of_equal_pieces((0, 4, 8, 12), frozenset({4})) == [(0, 4, 1), (8, 4, 1)]

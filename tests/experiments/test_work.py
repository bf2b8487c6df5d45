"""Shares of attention work, against pairs that are counted one by one."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import work

PAIRS = {
    "full": lambda i, j, head: True,
    "local": lambda i, j, head: i // 8 == j // 8,
    "window": lambda i, j, head: i - j < 4,
    "s2": lambda i, j, head: (i + (4 if head >= 3 else 0)) // 8 == (j + (4 if head >= 3 else 0)) // 8,
}


@pytest.mark.parametrize("length", [37, 32, 8, 5])
@pytest.mark.parametrize("pattern", PAIRS)
def test_share_of_a_layer(pattern, length):
    if length <= 8 and pattern == "s2":  # a row of one group is not cut
        counted = 9 * work.causal_pairs(length)
    else:
        places = [(h, i, j) for h in range(9) for i in range(length) for j in range(i + 1)]
        counted = sum(PAIRS[pattern](i, j, h) for h, i, j in places)
    whole = 9 * length * (length + 1) // 2
    assert work.layer_share(pattern, length, 8, 9, 3) == pytest.approx(counted / whole)


@pytest.mark.parametrize("length", [640, 700, 100])
@pytest.mark.parametrize("chosen", [1, 2, None])
def test_share_of_a_layer_that_chooses_blocks(length, chosen):
    """A query's block, the one before, the first of the row, and `chosen` of the others, whichever they are."""
    counted = 0
    for i in range(length):
        own = i // 128
        seen = {own, max(own - 1, 0), 0}
        others = sorted(set(range(own)) - seen)[
            : 1 if chosen is None else chosen
        ]  # G 1024: 4 blocks, 3 of them always seen
        counted += sum(j // 128 in seen.union(others) for j in range(i + 1))
    share = work.layer_share("adaptive", length, 1024, 9, 3, chosen)
    assert share == pytest.approx(2 * counted / length / (length + 1))


def test_dense_steps_and_their_share():
    assert work.dense_step_numbers(13, 6, None) == {5, 11}
    assert work.dense_step_numbers(5, None, {"first": 2}) == {0, 1}
    assert work.dense_step_numbers(5, None, {"last": 9}) == {0, 1, 2, 3, 4}
    assert work.dense_step_numbers(5, None, None) == set()
    assert work.dense_step_numbers(12, None, {"every": 3, "after": 6}) == {8, 11}
    assert work.dense_step_numbers(7, 5, {"every": 3}) == {2, 4, 5}
    # 25 dense steps of 150; in the others 3 of 30 layers are dense and the rest do an eighth.
    found = work.attention_share([64] * 150, [1.0] * 25 + [0.1 + 0.9 * 0.125] * 125)
    assert found == pytest.approx((25 + 125 * (0.1 + 0.9 * 0.125)) / 150)
    # A short row is dense whatever the forward: 10 + 55 pairs of rows of 4 and 10, groups of 4 (10 + 10 + 3 pairs).
    shares = [work.layer_share("local", length, 4, 9, 3) for length in (4, 10)]
    assert work.attention_share([4, 10], shares) == pytest.approx((10 + 23) / (10 + 55))
    assert work.attention_share([4, 10], [shares[0], 1.0]) == 1

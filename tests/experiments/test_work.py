"""Shares of attention work, against pairs that are counted one by one."""

import pytest
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


def test_dense_steps_and_their_share():
    assert work.dense_step_numbers(13, 6, None) == {5, 11}
    assert work.dense_step_numbers(5, None, {"first": 2}) == {0, 1}
    assert work.dense_step_numbers(5, None, {"last": 9}) == {0, 1, 2, 3, 4}
    assert work.dense_step_numbers(5, None, None) == set()
    # 25 dense steps of 150; in the others 3 of 30 layers are dense and the rest do an eighth.
    assert work.attention_share(25, 150, 0.125, 3, 30) == pytest.approx((25 + 125 * (0.1 + 0.9 * 0.125)) / 150)
    assert work.attention_share(25, 150, None, 0, 30) is None

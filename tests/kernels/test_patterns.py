"""Numbers that a user gives for a pattern: which are taken, and what a fraction of the window is."""

import numpy as np
import pytest
import torch

from peft_longlora.kernels.patterns import check_pattern, group_size_of


@pytest.mark.parametrize("group_size", [np.int64(4), np.int32(4), np.uint8(4), torch.tensor(4)])
def test_whole_numbers_of_other_libraries_are_group_sizes(group_size):
    assert type(check_pattern(group_size, "s2")) is int and check_pattern(group_size, "s2") == 4


@pytest.mark.parametrize("group_size", [np.float64(4), torch.tensor(4.0), np.bool_(True), torch.tensor(True), "4"])
def test_what_is_no_whole_number_is_no_group_size(group_size):
    with pytest.raises(ValueError, match="must be an even number of tokens"):
        check_pattern(group_size, "s2")


@pytest.mark.parametrize("window", [10, 64, 100, 4096, 8192, 32768, 131072, 1_000_000])
def test_a_fraction_of_the_window_is_exact(window):
    """For every ratio of two digits and every n-th part: the float product is a token short for some."""
    for percent in range(1, 101):
        assert group_size_of(None, percent / 100, window) == max(2, window * percent // 100 // 2 * 2)
    for parts in range(1, 100):
        assert group_size_of(None, 1 / parts, window) == max(2, window // parts // 2 * 2)

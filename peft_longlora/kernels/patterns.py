"""Which patterns of attention there are, and the numbers that a user gives for them: group size, chosen blocks."""

from __future__ import annotations

import operator
from fractions import Fraction
from numbers import Real
from typing import Any

PATTERNS = ("s2", "local", "full")
# Patterns whose queries see blocks of keys instead of groups: see `blocks`.
BLOCK_PATTERNS = ("window", "adaptive")


def shift_of(group_size: int, pattern: str) -> int:
    """Tokens of the first group of the second half of the heads; 0 if it has the groups of the first half."""
    return {"s2": group_size // 2}.get(pattern, 0)


def whole_number(value: Any) -> int | None:
    """A whole number of Python, numpy or torch as an int; None for anything else, also for True and False."""
    if type(value) is int:
        return value
    try:
        # numpy 2.2, the last for Python 3.10, takes its own bool as an index, with a warning.
        return None if type(value).__name__.startswith("bool") else operator.index(value)
    except TypeError:
        return None


def check_pattern(group_size: Any, pattern: str) -> int:
    """The group size as an int. Refuses an unknown pattern, and a size that cannot be shifted by half.

    Raises: ValueError.
    """
    if pattern not in (*PATTERNS, *BLOCK_PATTERNS):
        known = ", ".join(map(repr, (*PATTERNS, *BLOCK_PATTERNS)))
        raise ValueError(f"pattern={pattern!r} is unknown. Use one of {known}.")
    size = whole_number(group_size)
    if size is None or size < 2 or size % 2:
        raise ValueError(
            f"group_size={group_size!r} cannot be used: it must be an even number of tokens, 2 or more, because "
            f"shifted heads move their groups by half of it."
        )
    return size


def group_size_of(group_size: int | None, ratio: float, window: int) -> int:
    """G in tokens: the given size, or a fraction of the window, rounded down to an even number.

    Raises: ValueError: a ratio outside (0, 1].

    Example: 0.58 of 100 tokens is 58, although the product of the two floats is a little less.
    """
    if group_size is not None:
        return group_size
    if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ValueError(f"group_size_ratio={ratio!r} is outside (0, 1]: it is a fraction of the window ({window}).")
    # The fraction that the user meant: a float cannot hold 0.58 or 1/3.
    return max(2, int(window * Fraction(ratio).limit_denominator(10**6)) // 2 * 2)


def check_layers(layers: Any) -> list[int] | None:
    """The indices of layers as a list of ints. Raises: ValueError: not a list, or not of whole numbers."""
    if layers is None:
        return None
    numbers = [whole_number(one) for one in layers] if isinstance(layers, list | tuple | set | frozenset) else [None]
    if None in numbers:
        raise ValueError(f"dense_layers={layers!r} must be a list of layer indices, each a whole number.")
    return numbers


def check_blocks(blocks: Any) -> int | None:
    """The number of chosen blocks, None for the default. Raises: ValueError: not a whole number, or below 1."""
    if blocks is not None and (whole_number(blocks) or 0) < 1:
        raise ValueError(
            f"chosen_blocks={blocks!r} must be a whole number of blocks of 128 keys, 1 or more; None for as many as "
            f"cost what S2-Attn costs."
        )
    return None if blocks is None else whole_number(blocks)

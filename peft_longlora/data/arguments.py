"""Checks of arguments that several readers of data take."""

from __future__ import annotations

import operator
from typing import Any


def check_count(name: str, value: Any, least: int, what: str) -> int:
    """The value as an int.

    Args:
        name: of the argument.
        value: as it was given.
        least: the smallest number allowed.
        what: is counted, for the message.

    Raises: ValueError: not a whole number, or below `least`.
    """
    try:
        number = None if type(value).__name__.startswith("bool") else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name}={value!r} must be a whole number {what}, {least} or more.")
    return number

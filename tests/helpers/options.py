"""The options of a command: a test's own in place of those that most tests give, because none may be given twice."""

from collections.abc import Iterable


def with_usual(usual: dict[str, object], given: Iterable[object]) -> list[str]:
    """The words of a command line: the usual options and values that are not given, then what is given."""
    words = [str(word) for word in given]
    return [str(word) for pair in usual.items() if pair[0] not in words for word in pair] + words

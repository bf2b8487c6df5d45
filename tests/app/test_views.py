"""What a reader sees of a text."""

import pytest

from peft_longlora.app import views

PROSE = "of a creature who had never had but the one leg, and that in the"


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"cut here\n{PROSE}\nmiddle.", f"cut here {PROSE} middle."),
        (f"{PROSE}\nend.\n\n{PROSE}\nend.", f"{PROSE}\nend.\n\n{PROSE} end."),
        ("one\ntwo\nthree", "one\ntwo\nthree"),
        (f"def f():\n    {PROSE}\n    return 1", f"def f():\n    {PROSE}\n    return 1"),
        ("", ""),
        ("\n\n", "\n\n"),
    ],
)
def test_prose_fills_its_column_and_other_lines_stay(text, shown):
    assert views.unwrapped(text) == shown

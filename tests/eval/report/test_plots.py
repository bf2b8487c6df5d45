"""Plots and tables as they are seen: nothing lies on anything else, and large numbers are written out."""

import itertools

import pytest

from peft_longlora.eval.report.comparison import Difference
from peft_longlora.eval.report.plots import draw_perplexity
from peft_longlora.eval.report.side_by_side import make_comparison, plot_comparison
from peft_longlora.eval.report.units import show
from peft_longlora.hub.results import Row


def row(value, length=512, task="perplexity", metric="perplexity", variant="base", group=None, **options) -> Row:
    options = dict(low=0.7 * value, high=1.4 * value, units=5, tokens=None, beyond_window=False) | options
    return Row(task, "books", "documents", variant, metric, length, group, value, higher_is_better=False, **options)


def differences(count: int) -> list[Difference]:
    """Of `count` lengths, with long numbers."""
    lengths = [256 * 2**i for i in range(count)]
    pairs = [(row(312345.6, n), row(212345.6, n, beyond_window=n > 512)) for n in lengths]
    return [Difference(a, b, b.value - a.value, -143211.1, -43211.1, True) for a, b in pairs]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_numbers_under_the_panels_of_a_comparison_do_not_overlap(count):
    figure = plot_comparison(differences(count), ("before", "after"))
    figure.canvas.draw()
    [ax] = [ax for ax in figure.axes if ax.get_visible()]
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert len(boxes) == count
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_comparison_says_what_its_signs_mean():
    text = make_comparison(differences(3), [], ("before", "after"))
    assert "Differences are after less before" in text and "† above the window" in text
    assert [f"| {n} " in text for n in ("256", "512", "1024†")] == [True] * 3, "the second was not made for 1024"
    assert "| -100,000 " in text


def test_base_and_adapter_at_one_length_stand_side_by_side_in_their_colours():
    rows = [row(12.0, variant="adapter", task="native"), row(10.0, task="native")]
    parts = [row(r.value, variant=r.variant, task="native", group="0-512") for r in rows]
    figure = draw_perplexity(rows, parts, {"attention": "dense", "native_window": 512})
    left, right = figure.axes
    points = [line for line in left.lines if line.get_marker() == "o"]
    places = left.transAxes.inverted().transform(left.transData.transform([line.get_xydata()[0] for line in points]))
    assert all(0.4 < x < 0.6 for x, _ in places) and places[0][0] < places[1][0]
    assert [line.get_color() for line in points] == [tuple_to_hex(patch.get_edgecolor()) for patch in right.patches]


def tuple_to_hex(color) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in color[:3])


@pytest.mark.parametrize(
    ("value", "shown"), [(402697.4, "402,697"), (12345.6, "12346"), (-250000.0, "-250,000"), (9.87654, "9.8765")]
)
def test_numbers_are_written_out(value, shown):
    assert show(row(value)) == shown

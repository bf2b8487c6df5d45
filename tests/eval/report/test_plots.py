"""Plots and tables as they are seen: nothing lies on anything else, and large numbers are written out."""

import itertools

import pytest
from matplotlib.colors import to_hex

from peft_longlora.eval.report.comparison import Difference
from peft_longlora.eval.report.plots import draw_cost, draw_heat_map, draw_perplexity, draw_places, draw_task_map
from peft_longlora.eval.report.side_by_side import make_comparison, plot_comparison
from peft_longlora.eval.report.style import AFTER, BEFORE, RESCALED
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
    figure.draw_without_rendering()
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
    assert [line.get_color() for line in points] == [to_hex(patch.get_edgecolor()) for patch in right.patches]


MODEL = {"attention": "dense", "native_window": 512}


def test_before_and_after_have_one_colour_each_in_every_plot():
    """The base and what was made of it, the first run and the second; windows of one model are its shades."""

    def perplexities(*variants: str):
        rows = [row(10.0 + i, variant=variant) for i, variant in enumerate(variants)]
        figure = draw_perplexity(rows, [row(r.value, variant=r.variant, group="0-512") for r in rows], MODEL)
        return [line.get_color() for line in figure.axes[0].lines if line.get_marker() == "o"]

    assert perplexities("base", "rescaled", "adapter") == [BEFORE, RESCALED, AFTER]
    assert perplexities("base") == [BEFORE] and perplexities("adapter") == [AFTER]
    assert perplexities("adapter", "base") == [AFTER, BEFORE]
    pair = plot_comparison(differences(2), ("before", "after")).axes[0]
    assert [line.get_color() for line in pair.lines if line.get_marker() == "o"] == [BEFORE, AFTER]
    cost = draw_cost([row(1.0, task="cost", metric="kv_cache_bytes", variant="adapter")])
    assert cost.axes[0].lines[0].get_color() == AFTER
    parts = [row(9.0, length, group="0-256") for length in (256, 512, 1024)]
    shades = [to_hex(p.get_edgecolor()) for p in draw_perplexity([row(9.0)], parts, MODEL).axes[1].patches]
    assert shades[0] == BEFORE and len(set(shades)) == 3


def test_lines_that_coincide_are_all_seen():
    """Later ones are narrower and lie above: some of each colour stays visible."""
    rows = [row(10.0, n, variant=v) for v in ("base", "adapter") for n in (256, 512)]
    parts = [row(10.0, n, variant=v, group="0-256") for v in ("base", "adapter") for n in (256, 512, 1024, 2048)]
    left, right = draw_perplexity(rows, parts, MODEL).axes
    lines = [line for line in left.lines if line.get_marker() == "o"]
    for drawn in (lines, right.patches):
        widths = [each.get_linewidth() for each in drawn]
        assert len(widths) in (2, 8) and all(below - above >= 0.7 for below, above in itertools.pairwise(widths))
        assert [each.get_zorder() for each in drawn] == sorted({each.get_zorder() for each in drawn})


def test_no_line_is_left_out_however_many_there_are():
    parts = [row(9.0, 256 * n, group="0-256") for n in range(1, 12)]
    assert len(draw_perplexity([row(9.0)], parts, MODEL).axes[1].patches) == 11
    places = [row(0.5, None, "topics", "accuracy", group=f"{n} topics") for n in (5, 10)]
    many = [r.__class__(**{**vars(r), "dataset": f"set {i}"}) for i in range(9) for r in places]
    labels = draw_places(many, "topics").axes[0].get_legend_handles_labels()[1]
    assert labels == [f"base, set {i}" for i in range(9)], "data sets are lines of their own"


@pytest.mark.parametrize("spread", [1.0, 1.001, 1.5, 3.0])
def test_axes_do_not_exaggerate(spread):
    """On a logarithmic axis a factor of two is in view at the least, with all intervals; on others zero is."""
    rows = [row(10.0, 256, low=9.8, high=10.2), row(10.0 * spread, 512, low=9.8 * spread, high=10.2 * spread)]
    left, right = draw_perplexity(rows, [row(r.value, r.length, group=f"0-{r.length}") for r in rows], MODEL).axes
    for ax in (left, right):
        low, high = ax.get_ylim()
        assert high / low >= 2 and low < 9.8 + 0.2 * (ax is right) and high > 10.2 * spread - 0.2 * (ax is right)
    pairs = [Difference(r, row(1.01 * r.value, r.length), 0.1, 0.05, 0.15, True) for r in rows]
    low, high = plot_comparison(pairs, ("a", "b")).axes[0].get_ylim()
    assert high > 10.2 * spread and (low == 0 or (spread == 3.0 and high > 4 * low)), "a factor of four is logarithmic"


@pytest.mark.parametrize(
    ("value", "shown"), [(402697.4, "402,697"), (12345.6, "12346"), (-250000.0, "-250,000"), (9.87654, "9.8765")]
)
def test_numbers_are_written_out(value, shown):
    assert show(row(value)) == shown


def test_maps_of_base_and_adapter_stand_beside_each_other():
    """Each number is in the panel of its model, at its length and depth or task."""

    def shown(figure) -> dict[str, list[str]]:
        return {ax.get_title(loc="left"): [text.get_text() for text in ax.texts] for ax in figure.axes}

    def accuracy(value, length, variant, task="passkey", group=None):
        return row(value, length, task, "accuracy", variant, group, beyond_window=variant == "base" and length > 512)

    depths = [
        accuracy(value, length, variant, group=f"depth {depth}%")
        for variant, values in (("adapter", (1.0, 0.9, 0.8, 0.7)), ("base", (0.6, 0.5, 0.4, 0.3)))
        for value, (length, depth) in zip(values, itertools.product((512, 1024), (0, 100)), strict=True)
    ]
    figure = draw_heat_map(depths, "passkey")
    assert shown(figure) == {"base": ["60", "40", "50", "30"], "adapter": ["100", "80", "90", "70"]}
    labels = [[label.get_text() for label in ax.get_xticklabels()] for ax in figure.axes]
    assert labels == [["512", "1k†"], ["512", "1k"]]
    assert [ax._left_title.get_color() for ax in figure.axes] == [BEFORE, AFTER]
    tasks = [accuracy(0.5, 512, "base", "ruler_vt"), accuracy(0.7, 512, "adapter", "ruler_vt")]
    assert shown(draw_task_map(tasks)) == {"base": ["50"], "adapter": ["70"]}
    assert shown(draw_task_map(tasks[:1])) == {"": ["50"]}

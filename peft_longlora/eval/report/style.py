"""Shared by all plots: a colour for before and one for after, lines that stay visible, axes that do not exaggerate.

Needs matplotlib, but does not change its state (pyplot, backends).
"""

from __future__ import annotations

import math
from typing import Any

from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

# The base, or the first of two runs; the extended model, or the second. The same in every plot.
BEFORE, AFTER = "#d1495b", "#00798c"
RESCALED = "#b07d2b"  # RoPE alone is rescaled, nothing is trained


def color_of(variant: str) -> str:
    """The colour of the base, of the base with rescaled RoPE, or of the model made from it."""
    return {"base": BEFORE, "rescaled": RESCALED}.get(variant, AFTER)


def shade(color: str, index: int, count: int) -> str:
    """The index-th of `count` shades, from the colour itself to a light one."""
    white = 0.65 * index / max(count - 1, 1)
    return to_hex([part + (1 - part) * white for part in to_rgb(color)])


def layer(index: int, count: int) -> dict[str, Any]:
    """The style of the index-th of `count` lines. The first is the widest and lowest, so equal lines all stay
    visible."""
    step = min(2.4, 6 / max(count, 1))
    return dict(linewidth=1.6 + step * (count - 1 - index), zorder=2 + index / 100)


def axes(title: str, width: float = 7.0, height: float = 4.3, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of one line of panels, with a title."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    found = figure.subplots(1, columns, squeeze=False)
    for ax in found[0]:
        _clear(ax)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure, found[0]


def panels(count: int, columns: int, ticks: int) -> tuple[Figure, list[Any]]:
    """A figure of `count` small panels, wide enough for the given number of ticks with numbers below them."""
    lines = -(-count // columns)
    size = (max(4.2, 0.75 * ticks) * columns, 3.7 * lines)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    found = figure.subplots(lines, columns, squeeze=False)
    flat = list(found.flat)
    for ax in flat:
        _clear(ax)
    for ax in flat[count:]:
        ax.set_visible(False)
    return figure, flat


def _clear(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)


def fit_log(ax: Any, values: list[float]) -> None:
    """A logarithmic axis that shows all values (and ends of intervals) and spans at least a factor of two.

    Otherwise a single interval, or a difference of one percent, would fill the axis.
    """
    low, high = min(values), max(values)
    if high < 2 * low:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(2), middle * math.sqrt(2)
    ax.set_yscale("log")
    ax.set_ylim(low / 1.06, high * 1.06)
    round_ticks(ax.yaxis)


def fit_linear(ax: Any, values: list[float]) -> None:
    """A linear axis with zero in view."""
    ax.set_ylim(min(0.0, 1.12 * min(values)), max(0.0, 1.12 * max(values)) or 1.0)


def plain_ticks(axis: Any, values: list[int]) -> None:
    """These numbers of tokens on a logarithmic axis, and no others."""
    axis.set_ticks(values, [tokens(value) for value in values])
    axis.set_minor_locator(NullLocator())


def round_ticks(axis: Any) -> None:
    """Round numbers as numbers on a logarithmic axis: 1, 2, 5, 10, ..., or closer where the axis is short."""
    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if high / low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    ticks = [step * 10.0**power for power in range(-3, 9) for step in steps]
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) < 2:
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(ScalarFormatter())
        return
    axis.set_ticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_minor_locator(NullLocator())


def tokens(n: int) -> str:
    """A number of tokens, in k where it is a multiple of 1,024."""
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)

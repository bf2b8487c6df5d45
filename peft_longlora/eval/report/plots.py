"""Plots of results. Needs matplotlib; draws into files alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from peft_longlora.eval.report.units import UNITS, show_metric
from peft_longlora.hub.results import Results, Row
from peft_longlora.hub.writing import writing

OURS = "(perplexity|native)_(documents|longlora)|passkey|needle|ruler|multidoc|topics|cost"
COLORS = ("#00798c", "#d1495b", "#edae49", "#66a182", "#2e4057", "#8d99ae")


def write_plots(results: Results, folder: Path) -> list[str]:
    """Draw what the results hold, one file a task.

    Returns: names of the files.
    """
    rows = [row for row in results.results if row.metric != "bits_per_byte"]
    details = results.details
    figures: dict[str, Figure] = {}
    for task in ("perplexity", "native"):
        for protocol in dict.fromkeys(row.protocol for row in rows if row.task == task):
            ours = [row for row in rows if (row.task, row.protocol) == (task, protocol)]
            parts = [row for row in details if (row.task, row.protocol) == (task, protocol)]
            figures[f"{task}_{protocol}"] = draw_perplexity(ours, parts, results.model)
    for task in ("passkey", "needle"):
        for variant in dict.fromkeys(row.variant for row in details if row.task == task):
            ours = [row for row in details if (row.task, row.variant) == (task, variant)]
            figures[task] = draw_heat_map(ours, f"{task}: exact match, %")
    if ruler := [row for row in rows if row.task.startswith("ruler_")]:
        figures["ruler"] = draw_task_map(ruler)
    for task in ("multidoc", "topics"):
        if ours := [row for row in details if row.task == task]:
            figures[task] = draw_places(ours, task)
    if cost := [row for row in rows if row.task == "cost"]:
        figures["cost"] = draw_cost(cost)
    for path in folder.glob("*.png"):
        if path.stem not in figures and re.fullmatch(OURS, path.stem):
            path.unlink()  # of an earlier run in this folder, and of numbers that these results do not hold
    for name, figure in figures.items():
        with writing(folder / f"{name}.png") as file:
            figure.savefig(file, format="png")
        plt.close(figure)
    return [f"{name}.png" for name in figures]


def _axes(title: str, width: float = 7.0, height: float = 4.3, columns: int = 1) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(1, columns, figsize=(width, height), dpi=150, layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure, axes[0]


def _plain_ticks(axis: Any, values: list[int]) -> None:
    """These numbers of tokens on a logarithmic axis, and no others."""
    axis.set_ticks(values, [_tokens(value) for value in values])
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


def _tokens(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def draw_perplexity(rows: list[Row], parts: list[Row], model: dict[str, Any]) -> Figure:
    """Perplexity by window length, with intervals, and by position in the window."""
    place = " at the native window" if rows[0].task == "native" else ""
    title = f"Perplexity of {rows[0].dataset}{place}, protocol '{rows[0].protocol}', {model['attention']} attention"
    figure, (left, right) = _axes(title, 10.5, 4.3, 2)
    for place, variant in enumerate(dict.fromkeys(row.variant for row in rows)):
        color, shift = (
            COLORS[place % len(COLORS)],
            1.015**place,
        )  # beside each other, so that intervals can be told apart
        ours = sorted((row for row in rows if row.variant == variant), key=lambda row: row.length)
        left.plot([row.length * shift for row in ours], [row.value for row in ours], "o-", color=color, label=variant)
        for row in ours:
            if row.low is not None:
                left.plot([row.length * shift] * 2, [row.low, row.high], color=color, linewidth=4, alpha=0.35)
    lengths = sorted({row.length for row in rows})
    left.set(xscale="log", yscale="log", xlabel="window (tokens)", ylabel="perplexity")
    if len(lengths) == 1:
        left.set_xlim(lengths[0] / 1.2, lengths[0] * 1.2)
    _mark_window(left, model, lengths)
    left.legend(frameon=False)
    variants = list(dict.fromkeys(row.variant for row in parts))
    by_length = sorted({row.length for row in parts}, reverse=True)
    for color, length in zip(COLORS, by_length, strict=False):
        for place, (variant, line) in enumerate(zip(variants, ("-", "--", ":"), strict=False)):
            if len(by_length) == 1:
                color, line = COLORS[place], "-"  # as on the left
            ours = [row for row in parts if row.length == length and row.variant == variant]
            spans = sorted((*map(int, row.group.split("-")), row.value) for row in ours)
            if not spans:
                continue
            label = f"{_tokens(length)} window" + (f", {variant}" if len(variants) > 1 else "")
            edges = [low for low, _, _ in spans] + [spans[-1][1]]
            right.stairs([value for *_, value in spans], edges, baseline=None, color=color, ls=line, lw=2, label=label)
    right.set(yscale="log", xlabel="position in the window (tokens)")
    ends = sorted({int(row.group.split("-")[1]) for row in parts})
    _mark_window(right, model, [end for end in ends if end >= ends[-1] // 8])
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        round_ticks(ax.yaxis)
    return figure


def _mark_window(ax: Any, model: dict[str, Any], ticks: list[int]) -> None:
    if len(ticks) > 8:
        ticks = ticks[:: len(ticks) // 8 + 1]
    _plain_ticks(ax.xaxis, ticks)
    low, high = ax.get_xlim()
    if low <= model["native_window"] <= high:
        ax.axvline(model["native_window"], color="#444444", linestyle=":", linewidth=1.2)
        ax.text(model["native_window"], 1.0, " native window", fontsize=8, va="top", transform=ax.get_xaxis_transform())


def draw_heat_map(rows: list[Row], title: str) -> Figure:
    """Accuracy by length across and depth down."""
    lengths = sorted({row.length for row in rows})
    depths = sorted({float(re.findall(r"[\d.]+", row.group)[0]) for row in rows})
    values = {(float(re.findall(r"[\d.]+", row.group)[0]), row.length): row for row in rows}
    figure, (ax,) = _axes(title, 2.2 + 0.9 * max(3, len(lengths)), 1.6 + 0.42 * max(4, len(depths)))
    _draw_map(
        ax,
        [[values.get((depth, length)) for length in lengths] for depth in depths],
        [_tokens(n) + ("†" if values[depths[0], n].beyond_window else "") for n in lengths],
        [f"{depth:g}%" for depth in depths],
    )
    ax.set(xlabel="length (tokens)", ylabel="depth")
    return figure


def draw_task_map(rows: list[Row]) -> Figure:
    """RULER tasks down, lengths across."""
    lengths = sorted({row.length for row in rows})
    tasks = list(dict.fromkeys(row.task for row in rows))
    values = {(row.task, row.length): row for row in rows}
    figure, (ax,) = _axes(
        "RULER tasks: part of the answers found, %", 3.4 + 0.9 * max(3, len(lengths)), 1.6 + 0.42 * max(3, len(tasks))
    )
    _draw_map(
        ax,
        [[values.get((task, length)) for length in lengths] for task in tasks],
        [_tokens(n) + ("†" if any(r.length == n and r.beyond_window for r in rows) else "") for n in lengths],
        [task.removeprefix("ruler_") for task in tasks],
    )
    ax.set(xlabel="length (tokens)")
    return figure


def _draw_map(ax: Any, grid: list[list[Row | None]], columns: list[str], lines: list[str]) -> None:
    numbers = [[float("nan") if row is None else row.value for row in line] for line in grid]
    ax.imshow(numbers, cmap="YlGn", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(lines)), lines)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for y, line in enumerate(grid):
        for x, row in enumerate(line):
            if row is not None:
                ax.text(x, y, f"{100 * row.value:.0f}", ha="center", va="center", fontsize=9, color=_ink(row.value))


def _ink(value: float) -> str:
    return "white" if value > 0.6 else "black"


def draw_places(rows: list[Row], task: str) -> Figure:
    """Accuracy by the group's number: the gold passage's place, or how many topics there are."""
    figure, (ax,) = _axes(
        f"{task}: accuracy by {'place of the gold passage' if task == 'multidoc' else 'number of topics'}"
    )
    series: dict[str, list[Row]] = {}
    for row in rows:
        total = row.group.partition(" of ")[2]
        series.setdefault(f"{row.variant}, of {total} passages" if total else row.variant, []).append(row)
    for color, (label, ours) in zip(COLORS, series.items(), strict=False):
        points = sorted((int(re.findall(r"\d+", row.group)[0]), row) for row in ours)
        x = [number for number, _ in points]
        ax.plot(x, [100 * row.value for _, row in points], "o-", color=color, label=label)
        if all(row.low is not None for _, row in points):
            low, high = [100 * row.low for _, row in points], [100 * row.high for _, row in points]
            ax.fill_between(x, low, high, color=color, alpha=0.15)
    ax.set_xticks(sorted({int(re.findall(r"\d+", row.group)[0]) for row in rows}))
    ax.set(
        ylim=(-2, 102), ylabel="%", xlabel="place of the gold passage" if task == "multidoc" else "topics in the text"
    )
    ax.legend(frameon=False)
    return figure


def draw_cost(rows: list[Row]) -> Figure:
    """Each kind of cost by length."""
    metrics = [metric for metric in UNITS if any(row.metric == metric for row in rows)]
    figure, axes = _axes(f"Cost, {rows[0].protocol}", 3.2 * len(metrics), 3.4, len(metrics))
    for ax, metric in zip(axes, metrics, strict=True):
        ours = sorted((row for row in rows if row.metric == metric), key=lambda row: row.length)
        ax.plot([r.length for r in ours], [r.value / UNITS[metric][1] for r in ours], "o-", color=COLORS[0])
        ax.set(xscale="log", title=show_metric(ours[0]), xlabel="length (tokens)")
        ax.title.set_fontsize(9)
        ax.set_ylim(0, 1.12 * ax.get_ylim()[1])
        _plain_ticks(ax.xaxis, [row.length for row in ours])
    return figure


def panels(count: int, columns: int, ticks: int) -> tuple[Figure, list[Any]]:
    """A figure of `count` small panels, wide enough for so many ticks with numbers below them."""
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(max(4.2, 0.75 * ticks) * columns, 3.7 * lines),
        dpi=150,
        layout="constrained",
        squeeze=False,
    )
    flat = list(axes.flat)
    for ax in flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
    for ax in flat[count:]:
        ax.set_visible(False)
    return figure, flat

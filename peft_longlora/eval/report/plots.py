"""Plots of results, one file a task. Needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from peft_longlora.eval.report.style import axes, color_of, fit_linear, fit_log, layer, plain_ticks, shade, tokens
from peft_longlora.eval.report.units import UNITS, show_metric
from peft_longlora.hub.results import Results, Row, drop_plots
from peft_longlora.hub.writing import writing


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
        if ours := [row for row in details if row.task == task]:
            figures[task] = draw_heat_map(ours, f"{task}: exact match, %")
    if ruler := [row for row in rows if row.task.startswith("ruler_")]:
        figures["ruler"] = draw_task_map(ruler)
    for task in ("multidoc", "topics"):
        if ours := [row for row in details if row.task == task]:
            figures[task] = draw_places(ours, task)
    if cost := [row for row in rows if row.task == "cost"]:
        figures["cost"] = draw_cost(cost)
    drop_plots(folder, [f"{name}.png" for name in figures])
    for name, figure in figures.items():
        with writing(folder / f"{name}.png") as file:
            figure.savefig(file, format="png")
    return [f"{name}.png" for name in figures]


def draw_perplexity(rows: list[Row], parts: list[Row], model: dict[str, Any]) -> Figure:
    """Perplexity by window length, with intervals, and by position in the window."""
    place = " at the native window" if rows[0].task == "native" else ""
    title = f"Perplexity of {rows[0].dataset}{place}, protocol '{rows[0].protocol}', {model['attention']} attention"
    figure, (left, right) = axes(title, 10.5, 4.3, 2)
    _draw_by_length(left, rows)
    _mark_window(left, model, sorted({row.length for row in rows}))
    left.legend(frameon=False)
    _draw_by_position(right, parts)
    ends = sorted({int(row.group.split("-")[1]) for row in parts})
    _mark_window(right, model, [end for end in ends if end >= ends[-1] // 8])
    right.legend(frameon=False, fontsize=8)
    return figure


def _draw_by_length(ax: Any, rows: list[Row]) -> None:
    variants = list(dict.fromkeys(row.variant for row in rows))
    for place, variant in enumerate(variants):
        color, shift = color_of(variant), 1.015**place  # beside each other, so that intervals can be told apart
        ours = sorted((row for row in rows if row.variant == variant), key=lambda row: row.length)
        lengths = [row.length * shift for row in ours]
        ax.plot(lengths, [row.value for row in ours], "o-", color=color, label=variant, **layer(place, len(variants)))
        for length, row in zip(lengths, ours, strict=True):
            if row.low is not None:
                ax.plot([length] * 2, [row.low, row.high], color=color, linewidth=4, alpha=0.35)
    ax.set(xscale="log", xlabel="window (tokens)", ylabel="perplexity")
    if len({row.length for row in rows}) == 1:
        ax.set_xlim(rows[0].length / 1.2, rows[0].length * 1.2)
    fit_log(ax, [number for row in rows for number in (row.value, row.low, row.high) if number is not None])


def _draw_by_position(ax: Any, parts: list[Row]) -> None:
    """A step line a length and model; those that coincide lie on each other, the longest window's widest."""
    lengths = sorted({row.length for row in parts}, reverse=True)
    variants = list(dict.fromkeys(row.variant for row in parts))
    series = [(length, variant) for variant in variants for length in lengths]
    for index, (length, variant) in enumerate(series):
        ours = [row for row in parts if row.length == length and row.variant == variant]
        spans = sorted((*map(int, row.group.split("-")), row.value) for row in ours)
        if spans:
            label = f"{tokens(length)} window" + (f", {variant}" if len(variants) > 1 else "")
            edges = [low for low, _, _ in spans] + [spans[-1][1]]
            color = shade(color_of(variant), lengths.index(length), len(lengths))
            values = [value for *_, value in spans]
            ax.stairs(values, edges, baseline=None, color=color, label=label, **layer(index, len(series)))
    ax.set(xlabel="position in the window (tokens)")
    fit_log(ax, [row.value for row in parts])


def _mark_window(ax: Any, model: dict[str, Any], ticks: list[int]) -> None:
    if len(ticks) > 8:
        ticks = ticks[:: len(ticks) // 8 + 1]
    plain_ticks(ax.xaxis, ticks)
    low, high = ax.get_xlim()
    if low <= model["native_window"] <= high:
        ax.axvline(model["native_window"], color="#444444", linestyle=":", linewidth=1.2)
        ax.text(model["native_window"], 1.0, " native window", fontsize=8, va="top", transform=ax.get_xaxis_transform())


def draw_heat_map(rows: list[Row], title: str) -> Figure:
    """Accuracy by length across and depth down; a panel a model."""

    def depth_of(row: Row) -> str:
        (depth,) = re.findall(r"[\d.]+", row.group)
        return f"{float(depth):g}%"

    depths = sorted({depth_of(row) for row in rows}, key=lambda depth: float(depth[:-1]))
    return _draw_maps(rows, title, depth_of, depths, "depth")


def draw_task_map(rows: list[Row]) -> Figure:
    """RULER tasks down, lengths across; a panel a model."""
    tasks = list(dict.fromkeys(row.task.removeprefix("ruler_") for row in rows))
    title = "RULER tasks: part of the answers found, %"
    return _draw_maps(rows, title, lambda row: row.task.removeprefix("ruler_"), tasks, "")


def _draw_maps(rows: list[Row], title: str, line_of: Callable[[Row], str], lines: list[str], label: str) -> Figure:
    """Numbers by length across and something else down: a panel a model, all with the same lengths and lines."""
    lengths = sorted({row.length for row in rows})
    variants = list(dict.fromkeys(row.variant for row in sorted(rows, key=lambda row: row.variant != "base")))
    width = (1.6 + 0.1 * max(map(len, lines)) + 0.9 * max(3, len(lengths))) * len(variants)
    figure, panels = axes(title, width, 1.6 + 0.42 * max(3, len(lines)) + 0.3 * (len(variants) > 1), len(variants))
    for ax, variant in zip(panels, variants, strict=True):
        ours = {(line_of(row), row.length): row for row in rows if row.variant == variant}
        beyond = {row.length for row in ours.values() if row.beyond_window}
        grid = [[ours.get((line, length)) for length in lengths] for line in lines]
        _draw_map(ax, grid, [tokens(n) + ("†" if n in beyond else "") for n in lengths], lines)
        ax.set(xlabel="length (tokens)", ylabel=label)
        if len(variants) > 1:
            ax.set_title(variant, fontsize=10, color=color_of(variant), loc="left")
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
    is_place = task == "multidoc"
    figure, (ax,) = axes(f"{task}: accuracy by {'place of the gold passage' if is_place else 'number of topics'}")
    datasets = {row.dataset for row in rows}
    series: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        total = row.group.partition(" of ")[2]
        of = [f"of {total} passages"] if total else []
        series.setdefault((row.variant, *of, *([row.dataset] if len(datasets) > 1 else [])), []).append(row)
    variants = [name[0] for name in series]
    for index, (name, ours) in enumerate(series.items()):
        points = sorted((int(re.findall(r"\d+", row.group)[0]), row) for row in ours)
        x = [number for number, _ in points]
        color = shade(color_of(name[0]), variants[:index].count(name[0]), variants.count(name[0]))
        values = [100 * row.value for _, row in points]
        ax.plot(x, values, "o-", color=color, label=", ".join(name), **layer(index, len(series)))
        if all(row.low is not None for _, row in points):
            low, high = [100 * row.low for _, row in points], [100 * row.high for _, row in points]
            ax.fill_between(x, low, high, color=color, alpha=0.15)
    ax.set_xticks(sorted({int(re.findall(r"\d+", row.group)[0]) for row in rows}))
    ax.set(ylim=(-2, 102), ylabel="%", xlabel="place of the gold passage" if is_place else "topics in the text")
    ax.legend(frameon=False)
    return figure


def draw_cost(rows: list[Row]) -> Figure:
    """Each kind of cost by length."""
    metrics = [metric for metric in UNITS if any(row.metric == metric for row in rows)]
    figure, found = axes(f"Cost, {rows[0].protocol}", 3.2 * len(metrics), 3.4, len(metrics))
    for ax, metric in zip(found, metrics, strict=True):
        ours = sorted((row for row in rows if row.metric == metric), key=lambda row: row.length)
        values = [row.value / UNITS[metric][1] for row in ours]
        ax.plot([row.length for row in ours], values, "o-", color=color_of(ours[0].variant))
        ax.set(xscale="log", title=show_metric(ours[0]), xlabel="length (tokens)")
        ax.title.set_fontsize(9)
        fit_linear(ax, values)
        plain_ticks(ax.xaxis, [row.length for row in ours])
    return figure

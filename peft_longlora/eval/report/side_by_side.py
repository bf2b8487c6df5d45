"""A comparison as it is shown: compare.md and compare.png. Written of what `comparison` finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_longlora.eval.report.comparison import Difference
from peft_longlora.eval.report.tables import table
from peft_longlora.eval.report.units import PERCENT, scale_of, show, show_length, show_metric
from peft_longlora.hub.markdown import cell
from peft_longlora.hub.results import Row
from peft_longlora.hub.writing import write_whole, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, PLOT = "compare.md", "compare.png"


def write_comparison(differences: list[Difference], notes: list[str], labels: tuple[str, str], folder: Path) -> str:
    """Write table and plot into a folder; returns the table."""
    text = make_comparison(differences, notes, labels)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / REPORT, text)
    with writing(folder / PLOT) as file:
        plot_comparison(differences, labels).savefig(file, format="png")
    return text


def make_comparison(differences: list[Difference], notes: list[str], labels: tuple[str, str]) -> str:
    """The headline rows, then the details, as Markdown."""
    head = ["task", "protocol", "data", "length", "metric", *labels, "difference", "interval", "n", ""]
    lines = [
        f"# {cell(labels[1])} against {cell(labels[0])}",
        "",
        f"Differences are {cell(labels[1])} less {cell(labels[0])}, in brackets their intervals.",
    ]
    if any(row.beyond_window for d in differences for row in (d.first, d.second)):
        lines[-1] += " † above the window that one of the two was made for."
    lines.append("")
    for title, has_group in (("", False), ("## By position, depth and place", True)):
        rows = [d for d in differences if (d.first.group is not None) == has_group]
        if not rows:
            continue
        lines += [title, ""] if title else []
        lines += table(head, [_line(d) for d in rows])
        lines.append("")
    lines += [*(f"- {cell(note)}" for note in notes), ""] if notes else []
    return "\n".join(lines)


def _line(d: Difference) -> list[str]:
    row = d.first
    interval = "" if d.low is None else f"[{_signed(row, d.low)}, {_signed(row, d.high)}]"
    metric = show_metric(row) + (f", {row.group}" if row.group else "")
    units = f"{row.units}{'' if d.is_paired or d.low is None else ' and ' + str(d.second.units) + ', unpaired'}"
    text = [row.task, row.protocol, row.dataset, _length(d), metric, show(row), show(d.second)]
    return [*text, _signed(row, d.value), interval, units, d.verdict]


def _signed(row: Row, value: float | None) -> str:
    text = show(row, value)
    return text if value == 0 or text.startswith("-") else f"+{text}"


def _length(d: Difference) -> str:
    """The length, marked where it is above the window of one of the two."""
    return show_length(d.second if d.second.beyond_window else d.first)


def _below(d: Difference) -> str:
    """The length and, under it, the difference and its interval, in a narrow column."""

    def number(value: float) -> str:
        value /= scale_of(d.first.metric)
        return "0" if value == 0 else f"{value:+,.0f}" if abs(value) >= 1000 else f"{value:+.3g}"

    lines = [_length(d) or d.first.dataset, number(d.value)]
    if d.low is not None and d.high is not None:
        lines += [f"[{number(d.low)},", f"{number(d.high)}]"]
    return "\n".join(lines)


def plot_comparison(differences: list[Difference], labels: tuple[str, str]) -> Figure:
    """Both runs' values with their intervals, one panel for each task and metric; below, differences with theirs."""
    from peft_longlora.eval.report import style

    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for d in differences:
        if d.first.group is None:
            groups.setdefault((d.first.task, d.first.protocol, d.first.metric), []).append(d)
    columns = min(3, len(groups))
    figure, axes = style.panels(len(groups), columns, max(len(rows) for rows in groups.values()))
    for ax, ((task, protocol, metric), rows) in zip(axes, groups.items(), strict=False):
        numbers = []
        for index, (label, color) in enumerate(zip(labels, (style.BEFORE, style.AFTER), strict=True)):
            ours = [(d.first, d.second)[index] for d in rows]
            numbers += _draw_points(ax, ours, 0.2 * (index - 0.5), color, label)
        ax.set_xticks(range(len(rows)), [_below(d) for d in rows], fontsize=8 if len(rows) < 5 else 7)
        ax.set_xlim(-0.6, len(rows) - 0.4)
        unit = ", %" if metric in PERCENT else ""
        ax.set_title(f"{task}, {protocol}\n{show_metric(rows[0].first)}{unit}", fontsize=9, loc="left")
        if unit:
            ax.set_ylim(-3, 103)
        elif metric == "perplexity" and max(numbers) > 4 * min(numbers):
            style.fit_log(ax, numbers)
        else:
            style.fit_linear(ax, numbers)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _draw_points(ax: Any, rows: list[Row], shift: float, color: str, label: str) -> list[float]:
    """The values of one run, beside those of the other, with their intervals; gives all numbers drawn."""
    scale, numbers = scale_of(rows[0].metric), []
    for place, row in enumerate(rows):
        numbers.append(row.value / scale)
        if row.low is not None:
            ends = [row.low / scale, row.high / scale]
            ax.plot([place + shift] * 2, ends, color=color, alpha=0.5)
            numbers += ends
    x = [place + shift for place in range(len(rows))]
    ax.plot(x, [row.value / scale for row in rows], "o", color=color, label=label)
    return numbers

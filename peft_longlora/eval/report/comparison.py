"""Two runs side by side: values, the difference, and its interval over the same documents or prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_longlora.eval.journal import SAMPLES
from peft_longlora.eval.report import statistics
from peft_longlora.eval.report.cells import Cell, collect_cells, sort_key
from peft_longlora.eval.report.tables import table
from peft_longlora.eval.report.units import PERCENT, scale_of, show, show_length, show_metric
from peft_longlora.hub.results import RESULTS, Results, Row, rounded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, PLOT = "compare.md", "compare.png"


@dataclass(frozen=True)
class Difference:
    """One row of both runs. value, low, high: second less first, and its interval (None: not known).

    is_paired: whether both were measured on the same units, so that what makes units differ cancels.
    """

    first: Row
    second: Row
    value: float
    low: float | None
    high: float | None
    is_paired: bool

    @property
    def verdict(self) -> str:
        """Whether the interval leaves zero out, and in whose favour."""
        if self.low is None or self.high is None:
            return ""
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if (self.value > 0) == self.first.higher_is_better else "worse"


def compare(first: str | Path, second: str | Path) -> tuple[list[Difference], list[str]]:
    """Rows that both runs have, and notes on what keeps them from being comparable.

    Args:
        first, second: a results.json, or the folder it is in; samples.jsonl beside it gives the intervals.

    Raises:
        FileNotFoundError, ValueError: no results.json, or the two have no row in common.
    """
    runs = [Results.load(path) for path in (first, second)]
    cells = [_cells(path) for path in (first, second)]
    notes = _notes(*runs)
    if not all(cells):
        notes.append(f"No {SAMPLES} beside one of the two, so differences have no interval.")
    unequal_data = {n for n in runs[0].data.keys() & runs[1].data.keys() if _hash(runs[0], n) != _hash(runs[1], n)}
    ours, theirs = ({_key(run, row): row for row in [*run.results, *run.details]} for run in runs)
    found, has_others = [], False
    for key in ours.keys() & theirs.keys():
        row, other = ours[key], theirs[key]
        pair = [c.get((r.name, r.variant)) for c, r in zip(cells, (row, other), strict=True)]
        if any(c and rounded(c.sums()[1].value()) != r.value for c, r in zip(pair, (row, other), strict=True)):
            pair, has_others = [None, None], True
        is_same_data = not any(name.split(" (")[0] == row.task for name in unequal_data)
        found.append(_difference(row, other, *pair, is_same_data, runs[0].settings))
    if has_others:
        notes.append(
            f"{SAMPLES} of one of the two holds prompts that its {RESULTS} is not made of (other depths, seeds or "
            f"samples in the same folder), so some differences have no interval."
        )
    if not found:
        raise ValueError(f"{first} and {second} have no task, data, protocol and length in common.")
    return sorted(found, key=lambda difference: sort_key(difference.first)), notes


def _difference(
    row: Row, other: Row, cell: Cell | None, peer: Cell | None, is_same_data: bool, settings: dict[str, Any]
) -> Difference:
    if cell is None or peer is None:
        return Difference(row, other, other.value - row.value, None, None, False)
    (names, ours), (others, theirs) = cell.sums(), peer.sums()
    is_paired = is_same_data and names == others
    value, low, high = statistics.difference(
        ours, theirs, is_paired, settings["seed"], settings["bootstrap_replicates"], settings["confidence"]
    )
    return Difference(row, other, value, low, high, is_paired)


def _key(run: Results, row: Row) -> tuple[Any, ...]:
    """Rows of the extended models match, whatever they are; so do rows of their bases."""
    is_beside = row.variant == "base" and any(r.variant != "base" for r in run.results)
    return (*row.name, is_beside)


def _cells(path: str | Path) -> dict[tuple[Any, ...], Cell]:
    path = Path(path)
    samples = (path if path.is_dir() else path.parent) / SAMPLES
    if not samples.is_file():
        return {}

    def records() -> Iterator[dict[str, Any]]:
        with samples.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    return collect_cells(records())


def _hash(run: Results, name: str) -> str:
    return run.data[name].get("sha256", "")


def _notes(first: Results, second: Results) -> list[str]:
    notes = []
    for name in sorted(first.data.keys() & second.data.keys()):
        if _hash(first, name) != _hash(second, name):
            notes.append(f"{name}: not the same data, so differences are not paired.")
    for name in sorted(first.settings.keys() & second.settings.keys()):
        if isinstance(first.settings[name], dict) and first.settings[name] != second.settings[name]:
            notes.append(f"{name}: not the same settings: {first.settings[name]} and {second.settings[name]}.")
    for part, key in (("model", "dtype"), ("model", "attention"), ("hardware", "device")):
        ours, theirs = getattr(first, part)[key], getattr(second, part)[key]
        if ours != theirs:
            notes.append(f"{key}: {ours} and {theirs}.")
    return notes


def write_comparison(differences: list[Difference], notes: list[str], labels: tuple[str, str], folder: Path) -> str:
    """Write table and plot into a folder; returns the table."""
    text = make_comparison(differences, notes, labels)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(text, encoding="utf-8")
    plot_comparison(differences, labels).savefig(folder / PLOT)
    return text


def make_comparison(differences: list[Difference], notes: list[str], labels: tuple[str, str]) -> str:
    """The headline rows, then the details, as Markdown."""
    head = ["task", "protocol", "data", "length", "metric", *labels, "difference", "interval", "n", ""]
    lines = [
        f"# {labels[1]} against {labels[0]}",
        "",
        f"Differences are {labels[1]} less {labels[0]}, in brackets their intervals.",
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
    lines += [*(f"- {note}" for note in notes), ""] if notes else []
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
    from peft_longlora.eval.report import plots

    panels: dict[tuple[str, str, str], list[Difference]] = {}
    for d in differences:
        if d.first.group is None:
            panels.setdefault((d.first.task, d.first.protocol, d.first.metric), []).append(d)
    columns = min(3, len(panels))
    figure, axes = plots.panels(len(panels), columns, max(len(rows) for rows in panels.values()))
    for ax, ((task, protocol, metric), rows) in zip(axes, panels.items(), strict=False):
        scale = scale_of(metric)
        for index, (label, part) in enumerate(zip(labels, ("first", "second"), strict=True)):
            ours = [getattr(d, part) for d in rows]
            x = [i + 0.2 * (index - 0.5) for i in range(len(ours))]
            ax.plot(x, [row.value / scale for row in ours], "o", color=plots.COLORS[index], label=label)
            for place, row in zip(x, ours, strict=True):
                if row.low is not None:
                    ax.plot([place] * 2, [row.low / scale, row.high / scale], color=plots.COLORS[index], alpha=0.5)
        ax.set_xticks(range(len(rows)), [_below(d) for d in rows], fontsize=8 if len(rows) < 5 else 7)
        ax.set_xlim(-0.6, len(rows) - 0.4)
        values = [row.value for d in rows for row in (d.first, d.second)]
        if metric == "perplexity" and max(values) > 4 * min(values):
            ax.set_yscale("log")
            plots.round_ticks(ax.yaxis)
        unit = ", %" if metric in PERCENT else ""
        ax.set_title(f"{task}, {protocol}\n{show_metric(rows[0].first)}{unit}", fontsize=9, loc="left")
        if unit:
            ax.set_ylim(-3, 103)
    axes[0].legend(frameon=False, fontsize=8)
    return figure

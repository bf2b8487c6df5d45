"""The picture of a study: quality against attention work and position, and what is found. Called by `report`."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cells import Study
from figures import differences, found_at, metric, positions, short

MARKS = {"tokens": "o", "time": "^"}


def plot(study: Study, found: dict[tuple[str, str], list[dict[str, Any]]], file: Path) -> None:
    """Write a PNG of three panels: perplexity over the share of attention work, percent above the reference by
    position, and RULER's scores or the losses of keys by length. Without keys it has two."""
    scores = {row: found_at(lines) for row, lines in found.items()}
    panels = 3 if any(means for _, means in scores.values()) else 2
    size = 5.3 * panels, 4.6 + 0.16 * -(-len(found) // panels)
    figure, (left, middle, *rest) = plt.subplots(1, panels, figsize=size, layout="constrained")
    names = dict.fromkeys(name for name, _, _ in study.rows)
    several = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    colours = dict(zip(names, itertools.cycle(several), strict=False))
    percents, ticks, handles = differences(study, found), list(map(short, positions(study))), {}
    budgets = {budget for _, budget in found}
    for name, budget, label in study.rows:
        if not (lines := found.get((name, budget))):
            continue
        look = dict(color=colours[name], marker=MARKS[budget])
        line_look = dict(look, linestyle="-" if budget == "tokens" else "--")
        if (share := lines[0].get("attention_share")) is not None:
            values = [metric(line, "perplexity") for line in lines]
            error = statistics.stdev(values) if len(values) > 1 else 0
            left.errorbar(share, statistics.fmean(values), error, capsize=3, **look)
        if (name, budget) in percents and lines[0]["steps"]:  # untrained: far off the scale
            middle.plot(ticks, percents[name, budget][1:], **line_look)
        what, means = scores[name, budget]
        if means:
            rest[0].plot(list(map(short, means)), list(means.values()), **line_look)
            rest[0].set(xlabel="length, tokens", ylabel=what)
        handles[label + (f", equal {budget}" if len(budgets) > 1 else "")] = plt.Line2D([], [], **line_look)
    left.set(xlabel="share of full attention's work in training", ylabel="perplexity, validation books")
    if len(budgets) > 1:
        left.set_title("circle: equal tokens; triangle: equal time", fontsize=9)
    middle.axhline(0, color="black", linewidth=0.8)
    middle.set(xlabel="position, tokens", ylabel=f"% above {study.reference}")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=panels, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)

"""The picture of a study: quality against attention work, and against position. Called by `report`."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cells import Study
from figures import differences, metric, positions, short

MARKS = {"tokens": "o", "time": "^"}


def plot(study: Study, found: dict[tuple[str, str], list[dict[str, Any]]], file: Path) -> None:
    """Write a PNG of two panels: perplexity over the share of attention work, and percent above the reference."""
    legend = 0.16 * ((len(found) + 1) // 2)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6 + legend), layout="constrained")
    labels = {(name, budget): label for name, budget, label in study.rows}
    names = dict.fromkeys(name for name, _, _ in study.rows)
    several = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    colours = dict(zip(names, itertools.cycle(several), strict=False))
    for (name, budget), lines in found.items():
        share = lines[0].get("attention_share")
        if share is None:
            continue
        values = [metric(line, "perplexity") for line in lines]
        error = statistics.stdev(values) if len(values) > 1 else 0
        left.errorbar(share, statistics.fmean(values), error, color=colours[name], marker=MARKS[budget], capsize=3)
    left.set_xlabel("share of full attention's work in training")
    left.set_ylabel("perplexity, validation books")
    left.set_title("circle: equal tokens; triangle: equal time", fontsize=9)
    ticks = list(map(short, positions(study)))
    for (name, budget), percents in differences(study, found).items():
        if not found[name, budget][0]["steps"]:
            continue  # untrained: far off the scale
        style = "-" if budget == "tokens" else "--"
        label = f"{labels[name, budget]}, equal {budget}"
        right.plot(ticks, percents[1:], style, color=colours[name], marker=MARKS[budget], label=label)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xlabel("position, tokens")
    right.set_ylabel(f"% above {study.reference}")
    if right.get_legend_handles_labels()[0]:
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)

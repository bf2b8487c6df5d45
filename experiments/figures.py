"""The figures of a study's lines that tables and plots show."""

from __future__ import annotations

import operator
import statistics
from itertools import pairwise
from typing import Any

from cells import Study, line_of


def lines_by_row(study: Study, lines: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The lines of each (cell, budget), of all seeds; rows without a line are left out."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, budget, _ in study.rows:
        cells = [cell for cell in study.cells if (cell.name, cell.budget) == (name, budget)]
        if mine := [line for cell in cells if (line := line_of(cell, lines)) is not None]:
            found[name, budget] = mine
    return found


def metric(line: dict[str, Any], name: str) -> float:
    """A figure of a line: "perplexity", "perplexity_native", or a pair of edges such as "0-2048"."""
    metrics = line["metrics"]
    return metrics[name] if name.startswith("perplexity") else metrics["perplexity_by_position"][name]


def positions(study: Study) -> list[str]:
    """Names of the positions that are reported apart."""
    return [f"{first}-{last}" for first, last in pairwise(study.edges)]


def short(name: str) -> str:
    """Edges in thousands where they are whole ones. Example: "2048-8192" -> "2k-8k"."""
    return "-".join(f"{int(x) // 1024}k" if int(x) % 1024 == 0 and int(x) else x for x in name.split("-"))


def differences(study: Study, found: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[tuple[str, str], list[float]]:
    """Percent by which each row's mean perplexity differs from the reference's: overall, then by position.

    Of the seeds that both have, since a seed decides the rows that are trained on; a row without a common seed has no
    difference.
    """
    reference = {line["seed"]: line for line in found.get((study.reference, "tokens"), [])}
    names, percents = ("perplexity", *positions(study)), {}
    for row, mine in found.items():
        pairs = [(line, reference[line["seed"]]) for line in mine if line["seed"] in reference]
        if pairs and row != (study.reference, "tokens"):
            means = [
                [statistics.fmean(metric(line, name) for line in some) for name in names]
                for some in zip(*pairs, strict=True)
            ]
            percents[row] = [100 * (value / base - 1) for value, base in zip(*means, strict=True)]
    return percents


def found_at(lines: list[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """What a cell finds in a window, by its length: RULER's mean score over the tasks or, without, the nats a key.

    Returns: the name of the figure, and its mean over the lines (seeds) at each length; none if nobody measured it.
    """
    if rulers := [line["metrics"]["ruler"] for line in lines if "ruler" in line["metrics"]]:
        tasks = [task for one in rulers for task in one.values()]
        name, columns = "RULER, %", {length: [task[length]["score"] for task in tasks] for length in tasks[0]}
    else:
        keys = [line["metrics"].get("passkey", {}) for line in lines]
        name, columns = "nats a key", {length: [one[length]["loss"] for one in keys] for length in keys[0]}
    return name, {length: statistics.fmean(values) for length, values in columns.items()}


def answers(lines: list[dict[str, Any]], name: str, figure: str) -> list[float]:
    """A figure of every scored record of a file, averaged over the lines (seeds)."""
    rows = [line["metrics"]["records"][name][figure] for line in lines]
    return [statistics.fmean(values) for values in zip(*rows, strict=True)]


def answer_loss(lines: list[dict[str, Any]], name: str) -> float:
    """Mean loss of the tokens of all written answers of a file, nats."""
    tokens = lines[0]["metrics"]["records"][name]["tokens"]
    return sum(map(operator.mul, answers(lines, name, "loss"), tokens)) / sum(tokens)

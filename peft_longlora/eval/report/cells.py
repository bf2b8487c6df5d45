"""The samples behind the rows of a results.json: gathered into cells, and computed.

Called by `gather`, `callback` and `comparison`. `hub.results` has the file's schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft_longlora.eval.report import statistics
from peft_longlora.eval.report.units import MOST, PERCENT
from peft_longlora.hub.results import Row, rounded

LOWER_IS_BETTER = {"perplexity", "bits_per_byte", "peak_memory_bytes", "kv_cache_bytes", "seconds_to_first_token"}


@dataclass
class Cell:
    """The samples behind one row: a numerator and a denominator for each independent unit.

    contents: for each unit a number that identifies its questions in any order; None if a sample does not name them.
    """

    name: tuple[Any, ...]
    variant: str
    units: dict[str, list[float]] = field(default_factory=dict)
    contents: dict[str, int | None] = field(default_factory=dict)
    tokens: float = 0.0
    samples: int = 0
    beyond_window: bool = False
    standard_error: float | None = None  # from lm-eval, over this many questions
    questions: int | None = None
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        self.higher_is_better = self.name[3] not in LOWER_IS_BETTER

    def add(self, record: dict[str, Any], numerator: float, denominator: float, tokens: float | None) -> None:
        """Add one sample to its unit."""
        name = str(record["unit"])
        unit = self.units.setdefault(name, [0.0, 0.0])
        content, before = record.get("content"), self.contents.get(name, 0)
        unknown = before is None or not isinstance(content, str)
        self.contents[name] = None if unknown else (before + int(content, 16)) % 2**64
        unit[0] += numerator
        unit[1] += denominator
        self.tokens += tokens or 0
        self.samples += 1
        self.beyond_window |= bool(record.get("beyond_window"))
        self.standard_error = record.get("standard_errors", {}).get(self.name[3], self.standard_error)
        self.questions = record.get("questions") or self.questions
        self.higher_is_better &= self.name[3] not in record.get("lower_is_better", ())

    @property
    def is_perplexity(self) -> bool:
        """Whether the ratio is a loss in nats. Then its exponential is reported."""
        return self.name[3] == "perplexity"

    def sums(self) -> tuple[list[str], statistics.Ratios]:
        """Unit names in a fixed order, and their numerators and denominators."""
        names = sorted(self.units)
        units = [self.units[n] for n in names]
        is_score, most = self.name[3] in PERCENT, MOST.get(self.name[3])
        return names, statistics.Ratios(units, self.is_perplexity, is_score=is_score, most=most)

    def row(self, confidence: float) -> Row:
        """The cell as a row."""
        _, ratios = self.sums()
        low, high = ratios.interval(confidence)
        if self.standard_error is not None:
            low, high = statistics.around(ratios.value(), self.standard_error, confidence)
        tokens = self.tokens if self.is_perplexity else self.tokens / self.samples
        task, dataset, protocol, metric, length, group = self.name
        return Row(
            task=task,
            dataset=dataset,
            protocol=protocol,
            variant=self.variant,
            metric=metric,
            length=length,
            group=group,
            value=rounded(ratios.value()),
            low=rounded(low),
            high=rounded(high),
            units=self.questions or len(self.units),
            tokens=rounded(tokens) if tokens else None,
            beyond_window=self.beyond_window,
            higher_is_better=self.higher_is_better,
        )


def collect_cells(records: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], Cell]:
    """Gather samples into cells by (name, variant), in the order of their first samples.

    A sample's "measures" are [metric, group, numerator, denominator] or, with a token count, five entries.
    """
    cells: dict[tuple[Any, ...], Cell] = {}
    for record in records:
        for metric, group, numerator, denominator, *tokens in record["measures"]:
            name = (record["task"], record["dataset"], record["protocol"], metric, record["length"], group)
            cell = cells.setdefault((name, record["variant"]), Cell(name, record["variant"]))
            cell.add(record, numerator, denominator, tokens[0] if tokens else record.get("tokens"))
    return cells


def sort_key(row: Row) -> tuple[Any, ...]:
    """Rows in a fixed order: numbers in a group's name count as numbers."""
    group = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row.group or "")]
    return (row.task, row.dataset, row.protocol, row.variant, row.metric, row.length or 0, row.group is not None, group)

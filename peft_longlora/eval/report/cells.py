"""`results.json`: what an evaluation found, and how it was found. Read by `report`, `comparison` and the model card.

Schema version 1, a JSON object:

    schema_version  int, 1. A reader refuses a larger one
    created         UTC time, ISO 8601
    versions        {"peft_longlora", "transformers", "torch", "peft", "python": version}
    hardware        {"device", "processes": n}
    model           name, fingerprint, adapter (name or null), adapter_sha256 (or null), dtype, attention ("dense" or
                    "sparse"), rope_parameters, native_window and window (tokens, before and after extension)
    settings        {"seed", "bootstrap_replicates", "confidence"} and, by task, its parameters
    data            {task: {"name", "sources", "documents" or "records", "characters", "sha256"}}
    notes           sentences a reader must know: documents shorter than a window, truncated prompts, ...
    results         the headline rows, which a model card shows
    details         rows of the same kind by position, depth, place, ...: `group` is not null
    speed           {task: {"tokens", "seconds"}} of this run's own work
    unmeasured      tasks with their lengths that ran out of memory, such as "perplexity 262144 (documents)"; they have
                    no rows

Each row of `results` and `details`:

    task            "perplexity", "passkey", "ruler_vt", "multidoc", an lm-eval task, ...
    dataset         name of the data, or "generated"
    protocol        which of the known ways of measuring: "longlora", "documents", "ruler", ...
    variant         "base", "adapter", or "rescaled" (RoPE rescaled, nothing trained)
    metric          "perplexity", "accuracy", "f1", "rougeL", ...
    length          tokens of a window or prompt; null where the data decides
    group           null, or what the row is restricted to: "512-1024", "depth 50%", "gold at 1 of 10", ...
    value           finite number, rounded to 6 significant digits (whole numbers are not)
    low, high       interval at `confidence`, or null where there are not two independent units
    units           how many independent units (documents, prompts, questions) the interval is over
    tokens          scored tokens, or the mean prompt length, or null
    beyond_window   whether the length is above the window the model was made for
    higher_is_better  bool

Beside it lies samples.jsonl: one line for each window or prompt (see `journal`), from which every row can be computed
again; `comparison` does, to pair two runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_longlora.eval.report import statistics

SCHEMA_VERSION = 1
RESULTS, SAMPLES = "results.json", "samples.jsonl"
LOWER_IS_BETTER = {"perplexity", "peak_memory_bytes", "kv_cache_bytes", "seconds_to_first_token"}


@dataclass(frozen=True)
class Row:
    """One number with its interval; the fields are those of the schema above."""

    task: str
    dataset: str
    protocol: str
    variant: str
    metric: str
    length: int | None
    group: str | None
    value: float
    low: float | None
    high: float | None
    units: int
    tokens: float | None
    beyond_window: bool
    higher_is_better: bool

    @property
    def name(self) -> tuple[Any, ...]:
        """What the row measures: equal in two runs that can be compared. The variant is what they differ in."""
        return (self.task, self.dataset, self.protocol, self.metric, self.length, self.group)


@dataclass
class Cell:
    """The samples behind one row: a numerator and a denominator for each independent unit."""

    name: tuple[Any, ...]
    variant: str
    units: dict[str, list[float]] = field(default_factory=dict)
    tokens: float = 0.0
    samples: int = 0
    beyond_window: bool = False
    interval: tuple[float, float] | None = None  # where lm-eval gives one, over so many questions
    questions: int | None = None
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        self.higher_is_better = self.name[3] not in LOWER_IS_BETTER

    def add(self, record: dict[str, Any], numerator: float, denominator: float, tokens: float | None) -> None:
        """Add one sample to its unit."""
        unit = self.units.setdefault(str(record["unit"]), [0.0, 0.0])
        unit[0] += numerator
        unit[1] += denominator
        self.tokens += tokens or 0
        self.samples += 1
        self.beyond_window |= bool(record.get("beyond_window"))
        self.interval = record.get("intervals", {}).get(self.name[3]) or self.interval
        self.questions = record.get("questions") or self.questions
        self.higher_is_better &= self.name[3] not in record.get("lower_is_better", ())

    @property
    def is_perplexity(self) -> bool:
        """Whether the ratio is a loss, in nats, whose exponential is reported."""
        return self.name[3] == "perplexity"

    def sums(self) -> tuple[list[str], statistics.Ratios]:
        """Unit names in a fixed order, and their numerators and denominators."""
        names = sorted(self.units)
        return names, statistics.Ratios([self.units[n] for n in names], exponential=self.is_perplexity)

    def row(self, seed: int, replicates: int, confidence: float) -> Row:
        """The cell as a row."""
        _, ratios = self.sums()
        low, high = self.interval or ratios.interval(seed, replicates, confidence)
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
    """Samples gathered into cells, by (name, variant), in the order in which they first appear.

    A sample's "measures" are [metric, group, numerator, denominator] or, with a token count, five entries.
    """
    cells: dict[tuple[Any, ...], Cell] = {}
    for record in records:
        for metric, group, numerator, denominator, *tokens in record["measures"]:
            name = (record["task"], record["dataset"], record["protocol"], metric, record["length"], group)
            cell = cells.setdefault((name, record["variant"]), Cell(name, record["variant"]))
            cell.add(record, numerator, denominator, tokens[0] if tokens else record.get("tokens"))
    return cells


@dataclass
class Results:
    """The content of a results.json."""

    created: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    data: dict[str, Any]
    notes: list[str]
    results: list[Row]
    details: list[Row]
    speed: dict[str, Any]
    unmeasured: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        path = Path(path)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a results.json, or the one in a folder.

        Raises:
            FileNotFoundError: there is none. ValueError: it is no results.json of this or an older schema.
        """
        path = Path(path)
        path = path / RESULTS if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file. Give the results.json that `longlora eval` wrote.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["schema_version"]
            if version > SCHEMA_VERSION:
                raise ValueError(
                    f"schema_version {version} is newer than {SCHEMA_VERSION}, which this version of peft_longlora "
                    f"reads. Update it"
                )
            rows = {part: [Row(**row) for row in content[part]] for part in ("results", "details")}
            return cls(**{**content, **rows})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: no results.json of `longlora eval` ({type(error).__name__}: {error})."
            ) from error


def sort_key(row: Row) -> tuple[Any, ...]:
    """Rows in a fixed order: numbers in a group's name count as numbers."""
    group = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row.group or "")]
    return (row.task, row.dataset, row.protocol, row.variant, row.metric, row.length or 0, row.group is not None, group)


def rounded(value: float | None) -> float | None:
    """To the reported precision, 6 significant digits; a whole number, such as of bytes, stays as it is."""
    if value is None or not math.isfinite(value):
        return None
    return float(value) if float(value).is_integer() else float(f"{value:.6g}")

"""Compares two runs: values, differences, and intervals of differences over the same documents or prompts.

Only equal questions are paired; samples identify the text or tokens of their question. `side_by_side` shows what
is found; `longlora compare` calls both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_longlora.eval.report import statistics
from peft_longlora.eval.report.cells import Cell, collect_cells, sort_key
from peft_longlora.eval.report.units import OF_TEXT, too_few_of
from peft_longlora.eval.samples import SAMPLES, read_samples
from peft_longlora.hub.results import RESULTS, Results, Row, rounded


@dataclass(frozen=True)
class Difference:
    """One row of both runs.

    Attributes:
        value, low, high: second minus first, and its interval (None: not known).
        is_paired: whether both runs got the same questions, so that differences between questions cancel.
        unlike: why the two numbers do not mean the same, so that neither is better; "" if they do.
        too_few: what there are too few of for an interval, in words; "" if that is not why there is none.
    """

    first: Row
    second: Row
    value: float
    low: float | None
    high: float | None
    is_paired: bool
    unlike: str = ""
    too_few: str = ""

    @property
    def verdict(self) -> str:
        """Whether the interval excludes zero, and which run is better."""
        if self.unlike:
            return f"{self.unlike}, not judged"
        if self.low is None or self.high is None:
            return self.too_few
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if (self.value > 0) == self.first.higher_is_better else "worse"


def compare(first: str | Path, second: str | Path) -> tuple[list[Difference], list[str]]:
    """The rows that both runs have, and notes about what makes them less comparable.

    Args:
        first: a results.json or its folder; the intervals come from samples.jsonl beside it.
        second: the other run.

    Raises:
        FileNotFoundError, ValueError: there is no results.json, or the runs have no row in common.
    """
    pair = Pair(_Side.read(first), _Side.read(second))
    found = pair.differences()
    if not found:
        raise ValueError(
            f"{first} and {second} have no task, data, protocol and length in common. "
            + " ".join(_only_in(side, other, name) for side, other, name in pair.sides())
        )
    return sorted(found, key=lambda difference: sort_key(difference.first)), pair.notes()


@dataclass
class _Side:
    """One of the two runs: its results, the cells of its samples, and faults of the samples."""

    results: Results
    cells: dict[tuple[Any, ...], Cell]
    faults: list[str]

    @classmethod
    def read(cls, path: str | Path) -> _Side:
        path = Path(path)
        results, faults = Results.load(path), []
        samples = (path if path.is_dir() else path.parent) / SAMPLES
        if not samples.is_file():
            return cls(results, {}, [f"No {SAMPLES} beside {RESULTS} in {samples.parent.name}, so no intervals."])
        try:
            cells = collect_cells(read_samples(samples, faults.append))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            faults.append(f"{samples}: a sample lacks what every sample has ({type(error).__name__}: {error}).")
        # Incomplete samples give no interval, because it would be about other questions.
        return cls(results, {} if faults else cells, [f"{fault} So no intervals." for fault in faults[:3]])

    def rows(self) -> dict[tuple[Any, ...], Row]:
        """Rows by name. Rows of extended models match each other, and so do rows of bases."""
        rows = [*self.results.results, *self.results.details]
        has_other = any(row.variant != "base" for row in self.results.results)
        return {(*row.name, row.variant == "base" and has_other): row for row in rows}

    def cell(self, row: Row) -> Cell | None:
        """The samples of a row; None if they are missing or cover more than the row."""
        cell = self.cells.get((row.name, row.variant))
        return cell if cell is not None and rounded(cell.sums()[1].value()) == row.value else None


class Pair:
    """Two runs, and which parts of them are equal."""

    def __init__(self, first: _Side, second: _Side):
        self.first, self.second = first, second
        self._lost: set[str] = set()  # tasks of whose rows one has no samples
        self._unlike: dict[str, tuple[int, int]] = {}  # questions of equal names that differ, of how many
        data, other = first.results.data, second.results.data
        self._other_data = {name for name in data.keys() & other.keys() if _hash(data[name]) != _hash(other[name])}

    def sides(self) -> Iterator[tuple[_Side, _Side, str]]:
        """Pair the rows of both runs."""
        yield self.first, self.second, "first"
        yield self.second, self.first, "second"

    def differences(self) -> list[Difference]:
        """The differences of all rows that both runs have."""
        ours, theirs = self.first.rows(), self.second.rows()
        return [self._difference(ours[key], theirs[key]) for key in ours.keys() & theirs.keys()]

    def _difference(self, row: Row, other: Row) -> Difference:
        cell, peer = self.first.cell(row), self.second.cell(other)
        is_of_text = row.metric in OF_TEXT and row.length is not None  # lm-eval's tasks ask their own questions
        unlike = self._unlike_text(row, other) if is_of_text else ""
        if cell is None or peer is None:
            if self.first.cells and self.second.cells:
                self._lost.add(row.task)
            return Difference(row, other, other.value - row.value, None, None, False, unlike)
        settings = self.first.results.settings
        is_paired = self._is_same_question(row, cell, peer)
        (_, ours), (_, theirs) = cell.sums(), peer.sums()
        value, low, high = statistics.difference(ours, theirs, is_paired, settings["confidence"])
        if unlike:
            low = high = None
        too_few = "" if unlike or low is not None else next(filter(None, map(too_few_of, (row, other))), "")
        return Difference(row, other, value, low, high, is_paired, unlike, too_few)

    def _is_same_question(self, row: Row, cell: Cell, peer: Cell) -> bool:
        if self._has_other_data(row) or cell.units.keys() != peer.units.keys():
            return False
        if row.metric == "bits_per_byte":  # over whole documents, whatever the tokens are
            return True
        unlike = [unit for unit, content in cell.contents.items() if content is None or content != peer.contents[unit]]
        if unlike and row.group is None:
            self._unlike[f"{row.task} {row.length or row.dataset}"] = (len(unlike), len(cell.units))
        return not unlike

    def _has_other_data(self, row: Row) -> bool:
        return not self._other_data.isdisjoint((row.task, _with_protocol(row)))

    def _unlike_text(self, row: Row, other: Row) -> str:
        """Why perplexities, or bits per byte, are not of the same text, tokens and contexts; "" if they are."""
        if self._has_other_data(row):
            return "other text"
        if len({_cutting(side.results.settings, row) for side in (self.first, self.second)}) > 1:
            return "other settings"
        if row.metric == "bits_per_byte":
            return ""
        ours, theirs = (side.results.model.get("tokenizer_sha256") for side in (self.first, self.second))
        # Files without tokenizer digests: the same number of tokens of the same text.
        is_same = ours == theirs if ours and theirs else row.tokens == other.tokens
        return "" if is_same else "other tokens"

    def notes(self) -> list[str]:
        """Differences between the runs besides the models; complete after `differences`."""
        first, second = self.first.results, self.second.results
        notes = [fault for side in (self.first, self.second) for fault in side.faults]
        notes += [f"{name}: not the same data, so differences are not paired." for name in sorted(self._other_data)]
        notes += _unequal_settings(first.settings, second.settings)
        for name, (unlike, of) in self._unlike.items():
            notes.append(
                f"{name}: {unlike} of {of} documents or prompts of equal names differ in text or tokens, or do not "
                f"identify them, so differences are not paired."
            )
        if self._lost:
            notes.append(
                f"{', '.join(sorted(self._lost))}: {SAMPLES} of one of the two holds prompts that its {RESULTS} is not "
                f"made of (other depths, seeds or samples in the same folder), or lacks some, so some differences have "
                f"no interval."
            )
        notes += _unequal_tokenizers(first.model, second.model)
        for part, key in (("model", "dtype"), ("model", "attention"), ("hardware", "device")):
            ours, theirs = getattr(first, part).get(key), getattr(second, part).get(key)
            if ours != theirs:
                notes.append(f"{key}: {ours} and {theirs}.")
        for name in ("transformers", "torch", "peft", "tokenizers", "peft_longlora"):
            ours, theirs = first.versions.get(name), second.versions.get(name)
            if ours and theirs and ours != theirs:
                notes.append(f"{name}: {ours} and {theirs}.")
        return notes + [note for side in self.sides() if (note := _only_in(*side))]


def _with_protocol(row: Row) -> str:
    """The name in settings and data of a task that has several protocols (`tasks.task.name_of`)."""
    return f"{row.task} ({row.protocol})"


def _cutting(settings: dict[str, Any], row: Row) -> str:
    """How a row's text is cut into windows; into which buckets its positions fall stands in the row itself."""
    entry = settings.get(_with_protocol(row))
    return str({key: entry[key] for key in sorted(entry) if key != "buckets"} if isinstance(entry, dict) else entry)


def _hash(entry: Any) -> str:
    return entry.get("sha256", "") if isinstance(entry, dict) else ""


def _unequal_settings(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    notes = []
    if first["confidence"] != second["confidence"]:
        notes.append(f"Intervals of {first['confidence']:g} and {second['confidence']:g}; differences use the first.")
    for name in sorted(first.keys() & second.keys()):
        ours, theirs = first[name], second[name]
        if isinstance(ours, dict) and isinstance(theirs, dict) and ours != theirs:
            unlike = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
            said = "; ".join(f"{key}: {ours.get(key)} and {theirs.get(key)}" for key in unlike)
            notes.append(f"{name}: not the same settings: {said}.")
    return notes


def _unequal_tokenizers(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    notes = []
    names = f"{first.get('tokenizer')} and {second.get('tokenizer')}"
    ours, theirs = first.get("tokenizer_sha256"), second.get("tokenizer_sha256")
    if ours and theirs and ours != theirs:
        notes.append(
            f"The tokenizers differ ({names}), so perplexities are over different tokens and neither is called better. "
            f"Bits per byte compare such models."
        )
    if ours and theirs and first.get("chat_template_sha256") != second.get("chat_template_sha256"):
        notes.append(f"The chat templates differ ({names}).")
    return notes


def _only_in(side: _Side, other: _Side, name: str) -> str:
    """Rows that only one of the two runs has."""
    alone = [row for key, row in side.rows().items() if key not in other.rows() and row.group is None]
    shown = dict.fromkeys(f"{row.task} ({row.protocol}) {row.length or row.dataset}, {row.metric}" for row in alone)
    more = f", and {len(shown) - 6} more" if len(shown) > 6 else ""
    return f"Only in the {name}: {'; '.join(list(shown)[:6])}{more}." if shown else ""

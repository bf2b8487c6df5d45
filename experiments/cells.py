"""What a study is made of: cells read from YAML, each one configuration, one budget and one seed.

Called by `run` and `report`; knows nothing of models. README.md beside it describes the YAML.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rules import check_course

BUDGETS = ("tokens", "time")
STUDY_KEYS = {
    "title",
    "inherit",
    "data",
    "window",
    "seeds",
    "budgets",
    "reference",
    "config",
    "training",
    "evaluation",
    "cells",
}
CELL_KEYS = {"name", "label", "budgets", "seeds", "window", "config", "training"}
DATA = ("books", "records")
TRAINING = dict(
    steps=150,
    learning_rate=2e-4,
    embedding_learning_rate=5e-5,
    warmup_steps=10,
    decay=0.2,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
    bf16=False,
    dense_steps=None,
    group_sizes=None,
    rotating_layers=None,
    skip_positions=False,
    unscored=None,
    dense_weight=None,
    accumulation=None,
    parts=None,
    part_rate=None,
    liger=False,
    rows=None,
)
EVALUATION = dict(native_window=None, edges=None, passkey_lengths=[], passkeys=20, memorised=None, ruler=None)


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: of the row in the tables. label: what the tables call it.
        budget: "tokens" (the steps given) or "time" (as many steps as take the reference's seconds).
        seed: of the rows, their order and LoRA's start.
        data: "books" or "records". window: tokens of a training row, at most.
        config: fields of LongLoraConfig. training, evaluation: see README.md.
    """

    study: str
    name: str
    label: str
    budget: str
    seed: int
    data: str
    window: int
    config: dict[str, Any]
    training: dict[str, Any]
    evaluation: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells a cell's line from the others of its study."""
        return self.name, self.budget, self.seed

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result, as it stands in the line, but for the steps of a "time" cell, measured first."""
        # Without what is off, so that a new option leaves old lines as they are.
        training = {key: value for key, value in self.training.items() if value not in (None, False)}
        evaluation = {
            key: value for key, value in self.evaluation.items() if key not in ("memorised", "ruler") or value
        }
        if self.budget == "time":
            training.pop("steps")
        data = {} if self.data == "books" else {"data": self.data}
        return dict(window=self.window, config=self.config, training=training, evaluation=evaluation, **data)

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits of the settings: a line of other settings is not this cell's."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return f"{self.name}, equal {self.budget}, seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """Cells and what they share.

    Attributes:
        name: the stem of its file. title: a heading. reference: the cell that others are compared with.
        data: what rows are made of, "books" or "records".
        cells: in order of importance: each seed of all cells before the next seed, equal tokens before equal time.
    """

    name: str
    title: str
    reference: str
    data: str
    edges: list[int]
    passkey_lengths: list[int]
    cells: list[Cell] = field(default_factory=list)

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """(name, budget, label) of each row of the tables, in the order of the file."""
        first = {(cell.name, cell.budget): cell.label for cell in self.cells}
        names = list(dict.fromkeys(cell.name for cell in self.cells))
        return [(name, budget, first[name, budget]) for budget in BUDGETS for name in names if (name, budget) in first]


def read_study(path: str | Path) -> Study:
    """Read a study from its YAML.

    Raises: ValueError: a key or a value outside its rule.
    """
    path = Path(path)
    content = _read(path)
    parent = _read(path.with_name(content["inherit"])) if "inherit" in content else {}
    whole = {**{key: value for key, value in parent.items() if key not in ("cells", "title")}, **content}
    for key in ("config", "training", "evaluation"):
        whole[key] = {**parent.get(key, {}), **content.get(key, {})}
    window, seeds = whole.get("window"), whole.get("seeds", [0])
    if type(window) is not int or window < 4:
        raise ValueError(f"{path}: window={window!r} must be the tokens of a training row, 4 or more.")
    if (data := whole.get("data", "books")) not in DATA:
        raise ValueError(f"{path}: data={data!r} must be one of {DATA}.")
    evaluation = {**EVALUATION, **whole["evaluation"]}
    evaluation["edges"] = evaluation["edges"] or [0, window]
    evaluation["native_window"] = evaluation["native_window"] or window
    _check(path, "evaluation", evaluation, set(EVALUATION))
    entries = whole.get("cells") or []
    names = [entry.get("name") for entry in entries]
    if not entries or len(set(names)) < len(names) or None in names:
        raise ValueError(f"{path}: cells must be a list of entries with names of their own, and has {names}.")
    if whole.get("reference") not in names:
        raise ValueError(f"{path}: reference={whole.get('reference')!r} must be one of the cells, {names}.")

    def make(entry: dict[str, Any], budget: str, seed: int) -> Cell:
        training = {**TRAINING, **whole["training"], **entry.get("training", {})}
        _check(path, f"training of {entry['name']!r}", training, set(TRAINING))
        for key in ("learning_rate", "embedding_learning_rate", "decay"):
            if not isinstance(training[key], int | float):
                raise ValueError(f"{path}: {key}={training[key]!r} is no number to YAML. Write 2.0e-4, with the dot.")
        config = {**whole["config"], **entry.get("config", {})}
        try:
            check_course(training, config, data, entry.get("window", window))
        except ValueError as error:
            raise ValueError(f"{path}: training of {entry['name']!r}: {error}") from None
        label, most = entry.get("label", entry["name"]), entry.get("window", window)
        return Cell(path.stem, entry["name"], label, budget, seed, data, most, config, training, evaluation)

    order = [
        (entry, budget, seed)
        for seed in seeds
        for budget in BUDGETS
        for entry in entries
        if budget in entry.get("budgets", whole.get("budgets", ["tokens"])) and seed in entry.get("seeds", seeds)
    ]
    for entry in entries:
        _check(path, f"cell {entry['name']!r}", entry, CELL_KEYS)
    lengths, title = evaluation["passkey_lengths"], whole.get("title", path.stem)
    cells = [make(*one) for one in order]
    return Study(path.stem, title, whole["reference"], data, evaluation["edges"], lengths, cells)


def _read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check(path, "the study", content, STUDY_KEYS)
    return content


def _check(path: Path, what: str, found: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(found) - known):
        raise ValueError(f"{path}: {what} has {unknown}, which nothing reads. It may have {sorted(known)}.")


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The finished cells of a results file; none if there is no file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.is_file() else []


def line_of(cell: Cell, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The line of a cell, or None.

    Raises: ValueError: a line of that name holds other settings.
    """
    for line in lines:
        if (line["cell"], line["budget"], line["seed"]) == cell.key:
            if line["fingerprint"] != cell.fingerprint:
                raise ValueError(
                    f"{cell}: its line in the results holds {line['settings']}, the study has {cell.settings}. "
                    f"Name the new cell otherwise, or take the line out."
                )
            return line
    return None


def steps_of(cell: Cell, reference: str, lines: list[dict[str, Any]], device: str) -> int | None:
    """Steps to train: those given, or as many as take the reference's time on the same device.

    None: the lines that say how long a step takes are not there yet. The first seed decides for all.
    """
    if cell.budget == "tokens":
        return cell.training["steps"]
    here = [line for line in lines if line["hardware"]["device"] == device]
    for line in here:
        if (line["cell"], line["budget"]) == (cell.name, "time"):
            return line["steps"]
    mine, other = (next(_timed(here, name), None) for name in (cell.name, reference))
    if mine is None or other is None:
        return None
    return round(other["steps"] * other["mean_step_seconds"] / mine["mean_step_seconds"])


def _timed(lines: list[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    return (line for line in lines if (line["cell"], line["budget"]) == (name, "tokens"))

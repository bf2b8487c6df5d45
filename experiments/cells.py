"""What a study is made of: cells read from YAML, each one configuration, one budget and one seed.

Called by `run` and `report`; knows nothing of models. README.md beside it describes the YAML.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rules import check_course, check_evaluation, check_numbers, check_plan, check_shape

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
    compile=False,
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
    window, seeds, budgets = whole.get("window"), whole.get("seeds", [0]), whole.get("budgets", ["tokens"])
    if (data := whole.get("data", "books")) not in DATA:
        raise ValueError(f"{path}: data={data!r} must be one of {DATA}.")
    evaluation = {**EVALUATION, **whole["evaluation"]}
    for key, usual in (("edges", [0, window]), ("native_window", window)):
        evaluation[key] = usual if evaluation[key] is None else evaluation[key]
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
        config, most = {**whole["config"], **entry.get("config", {})}, entry.get("window", window)
        try:
            check_numbers(training)
            check_course(training, config, data, most)
        except ValueError as error:
            raise ValueError(f"{path}: training of {entry['name']!r}: {error}") from None
        label = entry.get("label", entry["name"])
        return Cell(path.stem, entry["name"], label, budget, seed, data, most, config, training, evaluation)

    for entry in entries:
        _check(path, f"cell {entry['name']!r}", entry, CELL_KEYS)
    try:
        check_plan(whole, BUDGETS)
        for entry in entries:
            check_plan({"seeds": seeds, **entry}, BUDGETS, seeds)
            check_evaluation(evaluation, entry.get("window", window) if data == "books" else None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    order = [
        (entry, budget, seed)
        for seed in seeds
        for budget in BUDGETS
        for entry in entries
        if budget in entry.get("budgets", budgets) and seed in entry.get("seeds", seeds)
    ]
    lengths, title = evaluation["passkey_lengths"], whole.get("title", path.stem)
    cells = [make(*one) for one in order]
    untrained = {cell.name for cell in cells if not cell.training["steps"]}
    for cell in cells:
        if cell.budget == "time" and (idle := untrained & {cell.name, whole["reference"]}):
            raise ValueError(f"{path}: {min(idle)!r} has steps=0, and equal time with no step cannot be told.")
    if untrained and evaluation["memorised"]:
        raise ValueError(f"{path}: {min(untrained)!r} has steps=0, so no text that memorised could ask for.")
    return Study(path.stem, title, whole["reference"], data, evaluation["edges"], lengths, cells)


def _read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        check_shape(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check(path, "the study", content, STUDY_KEYS)
    return content


def _check(path: Path, what: str, found: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(found) - known):
        raise ValueError(f"{path}: {what} has {unknown}, which nothing reads. It may have {sorted(known)}.")


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The finished cells of a results file; none if there is no file.

    Without the end of a file that a run was stopped in the middle of: that cell has no line.

    Raises: ValueError: another line is not JSON.
    """
    path, found = Path(path), []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if line.endswith("\n"):
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}). Take it out, and its cell runs again."
                ) from error
    return found


def append_line(line: dict[str, Any], path: Path) -> bool:
    """Add a cell's line to a results file, unless another run has added one meanwhile.

    Returns: whether it was added.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # until it is closed: another run may add its line now
        keys = [(one["cell"], one["budget"], one["seed"]) for one in read_lines(path)]
        if (line["cell"], line["budget"], line["seed"]) in keys:
            return False
        before = path.read_bytes()
        rest = before[before.rfind(b"\n") + 1 :]
        gap = b"\n" if rest else b""
        try:
            json.loads(rest or b"0")
        except ValueError:  # half a line, of a run that was stopped
            os.truncate(path, len(before) - len(rest))
            gap = b""
        out.write(gap + json.dumps(line).encode() + b"\n")
    return True


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

"""What a card shows of an evaluation: results.json and the plots beside it, as `longlora eval` leaves them.

Called by `card`.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

RESULTS = "results.json"
SCHEMA = 1


def read_results(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a folder's results.json and the names of its plots.

    Returns:
        Rows with task, dataset, metric and value, and where they are given protocol, length (tokens), variant ("base",
        "adapter", "rescaled"), low and high (an interval), beyond_window; names of files.

    Raises:
        ValueError: results.json is no such file, or a link that leads out of the folder.
    """
    plots = sorted(path.name for path in folder.glob("*.png") if path.resolve().parent == folder.resolve())
    path = folder / RESULTS
    if not path.exists():
        return [], plots
    if path.resolve().parent != folder.resolve():
        raise ValueError(
            f"{path} is a link to {path.resolve()}, out of the adapter's folder. Put the file itself there."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["results"]
        if content.get("schema_version", SCHEMA) > SCHEMA:
            raise ValueError(f"schema_version {content['schema_version']} is newer than {SCHEMA}")
        for row in rows:
            if not all(isinstance(row[key], str) for key in ("task", "dataset", "metric")):
                raise ValueError(f"task, dataset and metric must be text in {row}")
            if isinstance(row["value"], bool) or not math.isfinite(row["value"]):
                raise ValueError(f"value must be a finite number in {row}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be used for the card: {type(error).__name__}: {error}. It must hold {{'schema_version': "
            f"{SCHEMA}, 'results': [{{'task', 'dataset', 'metric', 'value', ...}}]}}. Correct or remove it."
        ) from error
    return rows, plots


def copy_results(source: Path, folder: Path) -> None:
    """Put results.json and its plots where the card is.

    Raises: ValueError: there is no results.json, or `read_results` refuses it.
    """
    if not (source / RESULTS).is_file():
        raise ValueError(f"results={str(source)!r} has no {RESULTS}. Name the folder that the evaluation wrote.")
    _, plots = read_results(source)
    if source.resolve() != folder.resolve():
        for name in (RESULTS, *plots):
            shutil.copyfile(source / name, folder / name)


def shown(row: dict[str, Any]) -> str:
    """A value with its interval, in five digits; large numbers whole."""
    has_interval = row.get("low") is not None and row.get("high") is not None
    numbers = [row[key] for key in ("value", "low", "high")[: 3 if has_interval else 1]]
    value, *interval = (f"{n:,.0f}" if abs(n) >= 1e5 else f"{n:.5g}" for n in numbers)
    return f"{value} [{', '.join(interval)}]" if interval else value


def eval_result(row: dict[str, Any]) -> EvalResult:
    """A row as an entry of the Hub's `model-index`."""
    details = [str(row[key]) for key in ("protocol", "length") if row.get(key) is not None]
    details += ["beyond the window"] if row.get("beyond_window") else []
    return EvalResult(
        task_type="text-generation",
        task_name=row["task"],
        dataset_type=row["dataset"],
        dataset_name=row["dataset"],
        dataset_config=", ".join([row["task"], *details]),  # results that differ in it stay apart
        metric_type=row["metric"],
        metric_name=", ".join([row["metric"], *details]),
        metric_value=row["value"],
    )

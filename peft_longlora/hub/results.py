"""`results.json`: the results of an evaluation, and how they were measured.

`longlora eval` writes it; `longlora compare` and the model card read it. It is in the folder of a run, and beside an
adapter whose card shows it. In a file that was written by hand, a row needs only task, dataset, metric and value.

Schema version 1, a JSON object:

    schema_version  int, 1. A reader refuses a larger one
    created         UTC time, ISO 8601
    versions        {"peft_longlora", "transformers", "torch", "peft", "python": version}
    hardware        {"device", "processes": n}
    model           name, fingerprint, adapter (name or null), adapter_sha256 (or null), weights_sha256 (or null; of the
                    adapter's weights file alone, which other folders may hold too), tokenizer, tokenizer_sha256,
                    chat_template_sha256 (or null), dtype, attention ("dense" or "sparse"), rope_parameters,
                    native_window and window (tokens, before and after extension). A fingerprint is the Hub's commit;
                    for a folder it is what `sha256sum FILES | sha256sum` prints for its weights and configs
    settings        {"seed", "confidence"} and, by task, its parameters
    data            {task: {"name", "sources", "documents" or "records", "characters", "sha256"}}
    notes           warnings: documents shorter than a window, truncated prompts, ...
    results         the main rows, which a model card shows
    details         the same kind of rows by position, depth, place, ...: `group` is not null
    speed           {task: {"tokens", "seconds"}} of the work that this run did itself
    unmeasured      tasks with their lengths that ran out of memory, such as "perplexity 262144 (documents)"; they have
                    no rows

Each row of `results` and `details`:

    task            "perplexity", "passkey", "ruler_vt", "multidoc", an lm-eval task, ...
    dataset         name of the data, or "generated"
    protocol        the way of measuring: "longlora", "documents", "ruler", ...
    variant         "base", "adapter", or "rescaled" (RoPE rescaled, nothing trained)
    metric          "perplexity", "accuracy", "f1", "rougeL", ...
    length          tokens of a window or prompt; null if the data decides
    group           null, or the part that the row covers: "512-1024", "depth 50%", "gold at 1 of 10", ...
    value           finite number, rounded to 6 significant digits (whole numbers are not rounded)
    low, high       interval at `confidence`, or null if there are too few independent units
    units           the number of independent units (documents, prompts, questions) of the interval
    tokens          scored tokens, or the mean prompt length, or null
    beyond_window   whether the length is above the window the model was made for
    higher_is_better  bool

Beside it lies samples.jsonl: one line for each window or prompt, from which `eval` can compute every row again.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from peft_longlora.adapter.files import is_link_out, refuse_link
from peft_longlora.hub.writing import write_whole, writing

RESULTS = "results.json"
SCHEMA_VERSION = 1
# The plots that an evaluation draws, beside which other pictures may lie.
PLOTS = re.compile(r"((perplexity|native)_(documents|longlora)|passkey|needle|ruler|multidoc|topics|cost)\.png")
# Values for fields that a file leaves out.
_UNSAID = dict.fromkeys(("length", "group", "low", "high", "tokens")) | {
    "protocol": "",
    "variant": "adapter",
    "units": 0,
    "beyond_window": False,
    "higher_is_better": True,
}


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

    @classmethod
    def of(cls, content: dict[str, Any]) -> Row:
        """Make a row from an object of a file.

        Raises: ValueError, TypeError, KeyError: a field is missing, or is not what the schema says.
        """
        content = {**_UNSAID, **content}
        for name in ("task", "dataset", "metric", "protocol", "variant"):
            if not isinstance(content[name], str):
                raise ValueError(f"{name} must be text in {content}")
        for name in ("value", "low", "high"):
            number = content[name]
            if (number is not None or name == "value") and not is_number(number):
                raise ValueError(f"{name} must be a finite number in {content}")
        low, high = (content["value"] if content[name] is None else content[name] for name in ("low", "high"))
        if not low <= content["value"] <= high:
            raise ValueError(f"value must be between low and high in {content}")
        for name in ("length", "units", "tokens"):
            number = content[name]
            if (number is not None or name == "units") and not (is_number(number) and number >= 0):
                raise ValueError(f"{name} must be a number of 0 or more in {content}")
        if content["group"] is not None and not isinstance(content["group"], str):
            raise ValueError(f"group must be text or null in {content}")
        for name in ("beyond_window", "higher_is_better"):
            if not isinstance(content[name], bool):
                raise ValueError(f"{name} must be true or false in {content}")
        return cls(**{each.name: content[each.name] for each in fields(cls)})

    @property
    def name(self) -> tuple[Any, ...]:
        """What the row measures. It is equal in two runs that can be compared; the variant may differ."""
        return (self.task, self.dataset, self.protocol, self.metric, self.length, self.group)

    @property
    def shown(self) -> str:
        """The value with its interval, in five digits; large numbers are rounded to whole numbers."""
        numbers = [self.value] if None in (self.low, self.high) else [self.value, self.low, self.high]
        value, *interval = (f"{n:,.0f}" if abs(n) >= 1e5 else f"{n:.5g}" for n in numbers)
        return f"{value} [{', '.join(interval)}]" if interval else value

    def eval_result(self) -> EvalResult:
        """The row as an entry of the Hub's `model-index`."""
        details = [str(part) for part in (self.protocol or None, self.length) if part is not None]
        details += ["beyond the window"] if self.beyond_window else []
        return EvalResult(
            task_type="text-generation",
            task_name=self.task,
            dataset_type=self.dataset,
            dataset_name=self.dataset,
            dataset_config=", ".join([self.task, *details]),  # the Hub keeps results with different configs apart
            metric_type=self.metric,
            metric_name=", ".join([self.metric, *details]),
            metric_value=self.value,
        )


@dataclass
class Results:
    """The content of a results.json, as the schema at the top of this file describes it.

    Attributes:
        created: the time, ISO 8601, UTC.
        versions: of Python and the packages that measured.
        hardware: the device, its memory, and the number of processes.
        model: base, adapter, RoPE, windows, dtype, attention.
        settings: the seed and how intervals were computed.
        data: each data set's name with its size and its hash.
        notes: warnings for readers.
        results: a row for each task, protocol, length, model and metric.
        details: rows by depth, position or group.
        speed: tokens a second, by task and length.
        unmeasured: what was asked for and left out, and why.
        schema_version: of this file's form.
    """

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
        """Write the file completely or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a results.json, or the one in a folder.

        Raises:
            FileNotFoundError: there is none. ValueError: it is not a results.json of this or an older schema.
        """
        path = Path(path)
        path = path / RESULTS if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file. Give the results.json that `longlora eval` wrote.")
        try:
            content = _read(path)
            _check(content)
            return cls(**{**content, "details": [Row.of(row) for row in content["details"]]})
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: not a results.json of `longlora eval` ({type(error).__name__}: {error})."
            ) from error


def _read(path: Path) -> dict[str, Any]:
    """The content of a results.json, with its main rows as `Row`s."""
    content = json.loads(path.read_text(encoding="utf-8"))
    version = content.get("schema_version", SCHEMA_VERSION)
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"schema_version {version} is newer than {SCHEMA_VERSION}, which this version of peft_longlora reads. "
            f"Update it"
        )
    return {**content, "results": [Row.of(row) for row in content["results"]]}


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(content: dict[str, Any]) -> None:
    """Check the parts that a comparison reads besides the rows.

    Raises: ValueError.
    """
    for name in ("versions", "hardware", "model", "settings", "data"):
        if not isinstance(content[name], dict):
            raise ValueError(f"{name} must be an object, not {content[name]!r}")
    settings = content["settings"]
    for name, low, high in (("seed", 0, 2**63), ("confidence", 0, 1)):
        if not (is_number(settings[name]) and low <= settings[name] <= high):
            raise ValueError(f"settings: {name} must be a number from {low} to {high}, not {settings[name]!r}")


def read_results(folder: Path) -> tuple[list[Row], list[str]]:
    """The main rows of a folder's results.json, and the names of its plots.

    Raises:
        ValueError: results.json does not follow the schema, or is a link out of the folder.
    """
    plots = sorted(path.name for path in folder.glob("*.png") if not is_link_out(path))
    path = folder / RESULTS
    if not path.exists():
        return [], plots
    refuse_link(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file, and results are read from a file of this name. Move it.")
    try:
        return _read(path)["results"], plots
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be used for the card: {type(error).__name__}: {error}. It must hold {{'schema_version': "
            f"{SCHEMA_VERSION}, 'results': [{{'task', 'dataset', 'metric', 'value', ...}}]}}. Correct or remove it."
        ) from error


def read_notes(folder: Path) -> list[str]:
    """The notes of a folder's results.json, which `read_results` has taken; a file written by hand may have none."""
    path = folder / RESULTS
    notes = _read(path).get("notes") if path.is_file() else None
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


def copy_results(source: Path, folder: Path) -> None:
    """Copy results.json and its plots into the folder of the card.

    Raises: ValueError: there is no results.json, or `read_results` refuses it.
    """
    if not (source / RESULTS).is_file():
        raise ValueError(f"results={str(source)!r} has no {RESULTS}. Name the folder that the evaluation wrote.")
    _, plots = read_results(source)
    if source.resolve() != folder.resolve():
        drop_plots(folder, plots)
        for name in (RESULTS, *plots):
            with (source / name).open("rb") as content, writing(folder / name) as copy:
                shutil.copyfileobj(content, copy)


def drop_plots(folder: Path, kept: list[str]) -> None:
    """Remove the plots of earlier results from a folder: its card shows all that lie there."""
    for path in folder.glob("*.png"):
        if path.name not in kept and PLOTS.fullmatch(path.name):
            path.unlink()


def rounded(value: float | None) -> float | None:
    """Round to the reported precision, 6 significant digits. A whole number, such as of bytes, is not rounded."""
    if value is None or not math.isfinite(value):
        return None
    return float(value) if float(value).is_integer() else float(f"{value:.6g}")

"""Run a study: each finished cell is one JSON line; a cell whose line exists is not run again.

    python experiments/run.py experiments/schedules.yaml --model FOLDER --tokens FOLDER
    python experiments/run.py experiments/schedules.yaml --list

README.md beside it says what a study is, and how to make FOLDER and its tokens.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from books import Books, train_rows
from cells import Cell, Study, append_line, line_of, read_lines, read_study, steps_of
from metrics import check_measures, measure
from records import check_scores, measure_records, record_rows, split_records
from train import make_model, train
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import is_liger_kernel_available
from yaml import YAMLError

from peft_longlora.cli.arguments import Parser

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "peft_longlora",
    "flash-attn-4",
    "liger-kernel",
    "triton",
    "numpy",
)
HERE = Path(__file__).parent
# Seconds, until a line says better: to load, for a step of full attention, to measure.
GUESS = dict(loading=15, step=0.7, measuring=45)


class Kernels(logging.Handler):
    """Notes which kernels the package says that it runs on."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "runs on backend" in (message := record.getMessage()):
            self.found.append(message)
            print(f"  {message}", flush=True)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="+", help="YAML files, one after the other")
    parser.add_argument("--model", help="the base: a transformers folder or a Hub id")
    parser.add_argument("--tokens", help="the folder that books.py wrote train and validation to")
    parser.add_argument("--records", help="the folder of records, for studies with data: records")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--results", default=HERE / "results", type=Path, help="folder of the lines, NAME.jsonl")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds; no cell that takes longer")
    parser.add_argument("--only", nargs="+", help="names of cells")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds to run, of those in the file")
    parser.add_argument("--budgets", nargs="+", choices=["tokens", "time"], help="budgets to run")
    parser.add_argument("--save", type=Path, help="keep the adapters of the cells that run in this folder")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and stop")
    args = parser.parse_args(arguments)
    try:
        args.studies = [read_study(path) for path in args.study]
        _check(args)
    except (OSError, ValueError, YAMLError) as error:
        parser.error(" ".join(str(error).split()))
    return args


def _check(args: argparse.Namespace) -> None:
    """Refuse what would end every cell, before the first one starts.

    Raises: ValueError, OSError.
    """
    cells = [cell for study in args.studies for cell in study.cells]
    for option, what in (("only", "name"), ("seeds", "seed"), ("budgets", "budget")):
        if unknown := set(getattr(args, option) or ()) - {getattr(cell, what) for cell in cells}:
            raise ValueError(f"--{option} {min(unknown)}: no study has a cell of this {what}.")
    for file in sorted(args.results.glob("*.jsonl")):
        read_lines(file)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here. --device cpu runs a tiny study.")
    for study in args.studies:
        if any(cell.evaluation["ruler"] and not cell.evaluation["passkey_lengths"] for cell in study.cells):
            raise ValueError(f"{study.name}: ruler needs passkey_lengths, which are those of its prompts too.")
    if args.list:
        return
    if args.model is None:
        raise ValueError("--model is missing: the base that is trained.")
    AutoConfig.from_pretrained(args.model)
    have_liger = {cell.training["liger"] for cell in cells if is_wanted(cell, args)}
    if len(have_liger) > 1:
        raise ValueError("Liger's kernels stay for the process: run cells with liger: true and those without apart.")
    if True in have_liger and not is_liger_kernel_available():
        raise ValueError("liger: true needs Liger's kernels. To get them: pip install liger-kernel.")
    kinds = {cell.data for cell in cells}
    for file in ("train.npy", "train_off.npy", "validation.npy", "validation_off.npy") if "books" in kinds else ():
        if not (args.tokens and Path(args.tokens, file).is_file()):
            raise ValueError(f"--tokens {args.tokens}: there is no {file}. Write it with experiments/books.py.")
    if "records" in kinds and not (args.records and Path(args.records).is_dir()):
        raise ValueError(f"--records {args.records}: there is no folder of this name.")


def is_wanted(cell: Cell, args: argparse.Namespace) -> bool:
    """Whether --only, --seeds and --budgets let a cell run."""
    pairs = (cell.name, args.only), (cell.seed, args.seeds), (cell.budget, args.budgets)
    return all(value in (chosen or [value]) for value, chosen in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Run the cells that have no line yet, in order. Returns: the exit code, 1 if a cell failed."""
    args, start, kernels = parse_args(arguments), time.monotonic(), Kernels()
    logger = logging.getLogger("peft_longlora")
    logger.addHandler(kernels)
    logger.setLevel(logging.INFO)
    failed: list[str] = []
    for study in args.studies:
        for cell in study.cells:
            if not is_wanted(cell, args):
                continue
            try:
                if not run_cell(cell, study, args, start, kernels):
                    continue
            except Exception as error:  # the other cells go on
                traceback.print_exc(limit=-4)
                print(f"{cell}: FAILED, {type(error).__name__}: {error}", flush=True)
                failed.append(str(cell))
                del error
            gc.collect()  # a PEFT model refers to itself
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(f"Done after {time.monotonic() - start:.0f} s, {len(failed)} failed{': ' if failed else ''}", end="")
    print(*failed, sep="; ", flush=True)
    logger.removeHandler(kernels)
    return 1 if failed else 0


def run_cell(cell: Cell, study: Study, args: argparse.Namespace, start: float, kernels: Kernels) -> bool:
    """Run one cell and append its line, unless it is done, waits for another or would take too long.

    Returns: whether it was tried.
    """
    file = args.results / f"{study.name}.jsonl"
    lines, device = read_lines(file), device_name(args.device)
    if (line := line_of(cell, lines)) is not None:
        print(f"{cell}: done, {json.dumps(line['metrics'])[:120]}", flush=True)
        return False
    if (line := twin_of(cell, args.results)) is not None:
        if not args.list:
            names = dict(study=cell.study, cell=cell.name, run_in=line.get("run_in", line["study"]))
            append_line({**line, **names}, file)
        print(f"{cell}: the same run as {line['cell']} of {line['study']}", flush=True)
        return False
    steps = steps_of(cell, study.reference, lines, device)
    if steps is None:
        timed = " and ".join(dict.fromkeys((cell.name, study.reference)))
        print(f"{cell}: waits for {timed} with equal tokens on {device!r}; then run this again", flush=True)
        return False
    needed, left = guess_seconds(cell, steps, args.results, device), args.stop_after - (time.monotonic() - start)
    of = f" of {left:.0f} s left" if left < float("inf") else ""
    print(f"{cell}: {steps} steps, about {needed:.0f} s{of}", flush=True)
    if args.list or needed > left:
        print("  not started" + ("" if args.list else ": no time"), flush=True)
        return False
    line = finish_cell(cell, steps, args, kernels)
    rest = "" if append_line(line, file) else " (left out: another run has added the cell's line)"
    print(f"{cell}: {line['seconds']:.0f} s, {json.dumps(line['metrics'])}{rest}", flush=True)
    return True


def twin_of(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The line of a run with the same settings, steps and seed in any study, which need not run twice."""
    if cell.budget != "tokens":
        return None
    lines = (line for file in sorted(folder.glob("*.jsonl")) for line in read_lines(file))
    same = cell.fingerprint, cell.budget, cell.seed
    return next((line for line in lines if (line["fingerprint"], line["budget"], line["seed"]) == same), None)


def finish_cell(cell: Cell, steps: int, args: argparse.Namespace, kernels: Kernels) -> dict[str, Any]:
    """Train and measure. Returns: the line."""
    begin = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = make_model(cell, args.model, args.device)
    training: dict[str, Any] = {}
    count = steps * (cell.training["accumulation"] or 1)
    if cell.data == "records":
        check_scores()
        trained, scored = split_records(args.records)
        rows = record_rows(trained, tokenizer, cell.window, count, cell.seed)
        scores = partial(measure_records, model, tokenizer, scored, cell.window)
    else:
        rows = train_rows(Books.read(args.tokens, "train"), cell.window, count, cell.seed, cell.training["rows"])
        held = Books.read(args.tokens, "validation")
        distinct = list({tuple(row["input_ids"]): row["input_ids"] for row in rows}.values())
        what = model, tokenizer, held, cell.window, cell.evaluation, distinct
        check_measures(*what)
        scores = partial(measure, *what)
    if steps:
        training = train(cell, model, rows, args.device)
    trained_at = time.monotonic()
    if args.save:  # before the scores: a merge ends the adapter
        model.save_pretrained(args.save / "-".join((cell.study, cell.name, cell.budget, str(cell.seed))))
    with torch.compiler.set_stance("force_eager" if cell.training["compile"] else "default"):  # rows of many lengths
        metrics = scores()
    return dict(
        study=cell.study, cell=cell.name, budget=cell.budget, seed=cell.seed, steps=steps,
        fingerprint=cell.fingerprint, settings=cell.settings, metrics=metrics, **training,
        measuring_seconds=time.monotonic() - trained_at, seconds=time.monotonic() - begin,
        versions=versions(), kernels=kernels.found, commit=commit(),
        hardware=dict(device=device_name(args.device), python=platform.python_version(), cpus=os.cpu_count()),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip


def guess_seconds(cell: Cell, steps: int, folder: Path, device: str) -> float:
    """How long a cell will take, by the lines of all studies on this device with rows of this kind.

    Its steps are like its own of another seed or budget; else like those with the same config; else like the slowest of
    all. Without a line it is a guess.
    """
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in read_lines(file)]
    same = cell.data, cell.window, device
    lines = [line for line in lines if _kind_of(line) == same]
    timed = [line for line in lines if "mean_step_seconds" in line]
    mine = [line for line in timed if (line["study"], line["cell"]) == (cell.study, cell.name)]
    like = mine or [line for line in timed if line["settings"]["config"] == cell.config] or timed
    step = max((line["mean_step_seconds"] for line in like), default=GUESS["step"])
    measuring = max((line["measuring_seconds"] for line in mine or lines), default=GUESS["measuring"])
    return GUESS["loading"] + 1.1 * (steps * step + measuring)


def _kind_of(line: dict[str, Any]) -> tuple[str, int, str]:
    settings = line["settings"]
    return settings.get("data", "books"), settings["window"], line["hardware"]["device"]


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}"


def versions() -> dict[str, str]:
    """Of what computes the result, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            continue
    import peft_longlora

    return {**found, "peft_longlora": peft_longlora.__version__, "cuda": torch.version.cuda or "none"}


def commit() -> str | None:
    """The commit that ran: of the checkout, or what the environment says where there is none."""
    git = shutil.which("git")
    if git and (HERE.parent / ".git").exists():
        command = [git, "-C", str(HERE), "rev-parse", "--short=12", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if found:
            return found
    return os.environ.get("LONGLORA_COMMIT")


if __name__ == "__main__":
    sys.exit(main())

"""Run tasks on a model: shared among processes, journalled, resumable; then rows, table and plots."""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from peft_longlora.data.prefetch import prefetch
from peft_longlora.eval.journal import Journal
from peft_longlora.eval.processes import Processes
from peft_longlora.eval.report.cells import collect_cells, sort_key
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.task import Item, Task
from peft_longlora.hub.loading import is_out_of_memory
from peft_longlora.hub.results import RESULTS, Results

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Settings:
    """How intervals are made, and the seed of generated prompts and of the bootstrap."""

    seed: int = 0
    bootstrap_replicates: int = 1000
    confidence: float = 0.95


def evaluate(
    subject: Subject,
    tasks: list[Task],
    output: str | Path,
    *,
    settings: Settings | None = None,
    overwrite: bool = False,
    processes: Processes | None = None,
    show_progress: bool = True,
) -> Results | None:
    """Measure everything that is not measured yet, and write results.json, results.md and the plots.

    Args:
        subject: the model. tasks: what to measure. output: a folder; one that holds the same run goes on.
        overwrite: throw away what the folder holds. processes: who shares the work.

    Returns:
        The results, in the main process; None in others.

    Raises:
        ValueError: the folder holds another run; the model computes no number somewhere.

    A task or length that runs out of memory is left out of the results, which name it, and the others go on.
    """
    settings, processes = settings or Settings(), processes or Processes()
    data = {name_of(task): task.data() for task in tasks}
    for task in tasks:
        task.check(subject)
    journal = Journal(output, processes.rank)
    identity = {"model": subject.description, **{name_of(t): {**t.parameters, "data": data[name_of(t)]} for t in tasks}}
    if processes.is_main:
        journal.open(identity, overwrite)
        processes.wait()
    else:
        processes.wait()
        journal.open(identity, is_main=False)
    done = journal.done()
    processes.wait()  # nobody writes before all have read
    speed: dict[str, dict[str, float]] = {}
    keys: dict[str, str] = {}  # of all items, and what each belongs to
    try:
        with subject.evaluating():
            subject.warm_up()
            for task in tasks:
                _run(task, subject, journal, done, keys, processes, speed, show_progress and processes.is_main)
    finally:
        journal.close()
    processes.wait()
    if not processes.is_main:
        return None
    journal.merge()
    results = gather(subject, tasks, journal, keys, settings, data, speed, processes.count)
    results.save(Path(output) / RESULTS)
    from peft_longlora.eval.report.tables import write_report

    write_report(results, Path(output))
    return results


def name_of(task: Task) -> str:
    """A task's name, with its protocol where it has a choice of them."""
    protocol = task.parameters.get("protocol")
    return f"{task.name} ({protocol})" if protocol else task.name


def _run(
    task: Task,
    subject: Subject,
    journal: Journal,
    done: set[str],
    keys: dict[str, str],
    processes: Processes,
    speed: dict[str, dict[str, float]],
    show_progress: bool,
) -> None:
    """This process's share of a task: every n-th of the items that no earlier run has finished.

    An item that can be started is finished when the next one has been, so that a GPU never waits for this thread.
    Where memory runs out the rest of the label is left out, a task at one length in most cases.
    """
    pending = count = 0
    protocol = name_of(task).removeprefix(task.name)
    has_room = True
    bar, label, place, begin = None, None, "", time.perf_counter()
    columns = min(100, shutil.get_terminal_size().columns)  # 80 where a terminal does not say
    started: list[tuple[Item, Callable[[], dict[str, Any]]]] = []

    def finish() -> None:
        for item, rest in started:
            record = rest()
            journal.write(record)
            _clock(speed, item, record, begin)
        started.clear()

    def begin_one(item: Item) -> None:
        try:
            rest = item.start() if item.start else item.measure
        finally:
            finish()
        started.append((item, rest))

    def attempt(step: Callable[..., None], *arguments: Item) -> None:
        nonlocal has_room
        try:
            return step(*arguments)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Out here, because the error holds on to the tensors of the frames that it came through.
        has_room = False
        started.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        bar.close()
        logger.warning(f"{place}: out of memory, left out.")

    try:
        for item in prefetch(task.items(subject)):
            if item.label != label:
                attempt(finish)
                if bar is not None:
                    bar.close()
                label, count, begin, has_room = item.label, 0, time.perf_counter(), True
                place = label + protocol
                bar = tqdm(desc=label, disable=not show_progress, ncols=columns)
            keys[item.key] = place
            count += 1
            bar.total = max(count, round(count / max(item.progress, 1e-9)))
            if item.key not in done:
                pending += 1
                if has_room and pending % processes.count == processes.rank:
                    attempt(begin_one, item)
            bar.update(1)
        attempt(finish)
    finally:
        if bar is not None:
            bar.close()  # an error stands on a line of its own


def _clock(speed: dict[str, dict[str, float]], item: Item, record: dict[str, Any], begin: float) -> None:
    """Count the tokens read and the time since the label's first item was at hand."""
    entry = speed.setdefault(item.label, {"tokens": 0, "seconds": 0.0})
    entry["tokens"] += record.get("inputs") or record.get("tokens") or 0
    entry["seconds"] = round(time.perf_counter() - begin, 3)


def gather(
    subject: Subject,
    tasks: list[Task],
    journal: Journal,
    keys: dict[str, str],
    settings: Settings,
    data: dict[str, Any],
    speed: dict[str, Any],
    processes: int,
) -> Results:
    """Results from the samples of this run's items, without what is not measured in full."""
    found = Counter(keys[record["key"]] for record in journal.records() if record["key"] in keys)
    unmeasured = [label for label, count in Counter(keys.values()).items() if found[label] < count]
    cut: dict[str, list[int]] = {}
    above: dict[str, list[bool]] = {}  # of prompts whose length the data decides

    def own() -> Iterator[dict[str, Any]]:
        for record in journal.records():
            if record["key"] in keys and keys[record["key"]] not in unmeasured:
                name = f"{record['task']} {record['dataset']}"
                if "cut_tokens" in record:
                    cut.setdefault(name, []).append(record["cut_tokens"])
                if record["length"] is None and "beyond_window" in record:
                    above.setdefault(name, []).append(record["beyond_window"])
                yield record

    cells = collect_cells(own())
    rows = [
        cell.row(settings.seed, settings.bootstrap_replicates, settings.confidence)
        for cell in cells.values()
        if any(denominator for _, denominator in cell.units.values())
    ]
    rows.sort(key=sort_key)
    notes = [*subject.notes, *(note for task in tasks for note in task.notes)]
    for name, tokens in cut.items():
        if any(tokens):
            notes.append(
                f"{name}: {sum(n > 0 for n in tokens)} of {len(tokens)} prompts were too long and lost their middle, "
                f"{sum(tokens)} tokens in all."
            )
    beyond = sorted({row.length for row in rows if row.beyond_window and row.length})
    if beyond:
        notes.append(
            f"Above the window of {subject.window} tokens that the model was made for: "
            f"{', '.join(map(str, beyond))} tokens (marked †)."
        )
    for name, are_above in above.items():
        if any(are_above):
            notes.append(
                f"{name}: {sum(are_above)} of {len(are_above)} prompts, with their answers, were above the window of "
                f"{subject.window} tokens that the model was made for (marked †)."
            )
    if unmeasured:
        notes.append(f"Out of memory, and so not measured: {', '.join(unmeasured)}.")
    device = subject.model.device
    return Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions(),
        hardware={
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
            "threads": torch.get_num_threads(),
            "processes": processes,
        },
        model=subject.description,
        settings={
            "seed": settings.seed,
            "bootstrap_replicates": settings.bootstrap_replicates,
            "confidence": settings.confidence,
            **{name_of(task): task.parameters for task in tasks},
        },
        data={name: entry for name, entry in data.items() if entry},
        notes=list(dict.fromkeys(notes)),
        results=[row for row in rows if row.group is None],
        details=[row for row in rows if row.group is not None],
        speed=speed,
        unmeasured=unmeasured,
    )


def versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on."""
    found = {"python": platform.python_version(), "peft_longlora": sys.modules["peft_longlora"].__version__}
    for name in ("transformers", "torch", "peft", "tokenizers", "datasets", "lm_eval", "rouge-score"):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            continue
    return found

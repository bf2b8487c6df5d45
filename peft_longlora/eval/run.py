"""Run tasks on a model: shared among processes, journalled, resumable; then rows, table and plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_longlora.eval.gather import device_name, gather
from peft_longlora.eval.identity import Digests, versions
from peft_longlora.eval.journal import DIGESTS, Journal
from peft_longlora.eval.processes import Processes
from peft_longlora.eval.report.tables import write_report
from peft_longlora.eval.share import Share
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.task import Task, name_of
from peft_longlora.hub.results import RESULTS, Results


@dataclass(frozen=True)
class Settings:
    """How intervals are made, and the seed of generated prompts and of the bootstrap."""

    seed: int = 0
    bootstrap_replicates: int = 1000
    confidence: float = 0.95


@dataclass
class Run:
    """One evaluation under way, as one process sees it.

    Attributes:
        data: what each task reads, by its name. done: keys of samples that earlier runs have finished.
        places: of all items, what each belongs to, such as "perplexity 8192 (documents)".
        speed: tokens and seconds of this process's own work, by label.
    """

    subject: Subject
    tasks: list[Task]
    journal: Journal
    processes: Processes
    settings: Settings
    data: dict[str, Any] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    places: dict[str, str] = field(default_factory=dict)
    speed: dict[str, dict[str, float]] = field(default_factory=dict)

    def check(self) -> None:
        """Read what the tasks read, and refuse what cannot be measured, before anything is.

        Raises: FileNotFoundError, ValueError.
        """
        made: dict[str, Any] = {}
        for task in self.tasks:
            name = name_of(task)
            self.data[name] = task.data()
            this = [task.parameters, self.data[name]]
            if made.setdefault(name, this) != this:
                raise ValueError(
                    f"Two tasks are called {name!r} and differ in settings or data, so their samples would be mixed "
                    f"up. Give one of them another name, or measure it in a run of its own."
                )
        for task in self.tasks:
            task.check(self.subject)

    def identity(self) -> dict[str, Any]:
        """What must be the same for samples to belong together."""
        tasks = {name_of(task): {**task.parameters, "data": self.data[name_of(task)]} for task in self.tasks}
        versions_of = versions("transformers", "torch", "peft", "tokenizers")
        del versions_of["python"]  # which changes no number
        return {
            "model": self.subject.description,
            "versions": versions_of,
            "device": device_name(self.subject),
            **tasks,
        }

    def open(self, overwrite: bool) -> None:
        """Begin or go on; the main process decides before any other whether the folder holds this run.

        Raises: ValueError: it holds another.
        """
        if self.processes.is_main:
            self.journal.lock()
            self.subject.identify(Digests(self.journal.folder / DIGESTS))
            self.journal.open(self.identity(), overwrite)
            self.processes.wait()
        else:
            self.processes.wait()
            self.journal.open({}, is_main=False)
        self.done = self.journal.done()
        self.processes.wait()  # nobody writes before all have read

    def measure(self, show_progress: bool) -> None:
        """This process's share of every task."""
        with self.subject.evaluating():
            self.subject.warm_up()
            for task in self.tasks:
                Share(self, task, show_progress and self.processes.is_main).measure()


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
        ValueError: the folder holds another run, or another run writes into it; the model computes no number somewhere.

    A task or length that runs out of memory is left out of the results, which name it, and the others go on.
    """
    processes = processes or Processes()
    run = Run(subject, tasks, Journal(output, processes.rank), processes, settings or Settings())
    run.check()
    try:
        run.open(overwrite)
        try:
            run.measure(show_progress)
        finally:
            run.journal.close()
        processes.wait()
        if not processes.is_main:
            return None
        run.journal.merge()
        results = gather(run)
        results.save(Path(output) / RESULTS)
        write_report(results, Path(output))
        return results
    finally:
        run.journal.release()

"""One evaluation in progress: its model, tasks, journal and processes, and what makes it the same run as another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft_longlora.eval.identity import Digests, device_name, versions
from peft_longlora.eval.journal import DIGESTS, Journal
from peft_longlora.eval.processes import Processes
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.task import Task, name_of


@dataclass(frozen=True)
class Settings:
    """The seed of generated prompts, and the confidence of intervals.

    Args:
        seed: of prompts.
        confidence: of the intervals, between 0 and 1.
    """

    seed: int = 0
    confidence: float = 0.95


@dataclass
class Run:
    """One evaluation in progress, as one process sees it.

    Attributes:
        data: the data of each task, by its name. done: keys of samples that earlier runs have finished.
        places: the place of every item, such as "perplexity 8192 (documents)".
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
        """Read the data of the tasks, and refuse what cannot be measured, before anything is measured.

        Raises: FileNotFoundError, ValueError.
        """
        made: dict[str, Any] = {}
        for task in self.tasks:
            name = name_of(task)
            self.data[name] = task.data()
            this = [task.parameters, self.data[name]]
            if made.setdefault(name, this) != this:
                raise ValueError(
                    f"Two tasks have the name {name!r} but differ in settings or data, so their samples would be mixed "
                    f"up. Give one of them another name, or measure it in a separate run."
                )
        for task in self.tasks:
            task.check(self.subject)

    def identity(self) -> dict[str, Any]:
        """Everything that must be equal in samples of one run."""
        tasks = {name_of(task): {**task.parameters, "data": self.data[name_of(task)]} for task in self.tasks}
        versions_of = versions("transformers", "torch", "peft", "tokenizers")
        del versions_of["python"]  # it changes no number
        return {
            # adapter_sha256 covers the weights file, and runs of before have no digest of that file alone
            "model": {name: value for name, value in self.subject.description.items() if name != "weights_sha256"},
            "versions": versions_of,
            "device": device_name(self.subject.model.device),
            **tasks,
        }

    def open(self, overwrite: bool) -> None:
        """Begin or continue. The main process checks first whether the folder holds this run.

        Raises: ValueError: it holds another run.
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
        self.processes.wait()  # no process writes before all have read

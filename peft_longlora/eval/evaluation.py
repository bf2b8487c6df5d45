"""`evaluate`: runs tasks on a model, shared among processes, with a journal to resume from; then writes the results."""

from __future__ import annotations

from pathlib import Path

from peft_longlora.eval.gather import gather
from peft_longlora.eval.journal import Journal
from peft_longlora.eval.processes import Processes
from peft_longlora.eval.report.tables import write_report
from peft_longlora.eval.run import Run, Settings
from peft_longlora.eval.share import Share
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.task import Task
from peft_longlora.hub.results import RESULTS, Results


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
        subject: the model.
        tasks: what to measure.
        output: a folder. The same run in it continues; another run that has ended moves to a folder in it.
        settings: how intervals are computed.
        overwrite: delete what the folder holds.
        processes: the processes that share the work. None: this process alone.
        show_progress: show a bar for each task.

    Returns:
        The results in the main process; None in the others.

    Raises:
        ValueError: the folder holds another run that has not ended, or another run writes into it, or the model
            computes NaN.

    If a task or length runs out of memory, it is left out and the results name it; the others continue.
    """
    processes = processes or Processes()
    run = Run(subject, tasks, Journal(output, processes.rank), processes, settings or Settings())
    run.check()
    try:
        run.open(overwrite)
        try:
            with subject.evaluating():
                subject.warm_up()
                for task in tasks:
                    Share(run, task, show_progress and processes.is_main).measure()
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

"""One process's share of one task: its items in order, a progress bar, a clock, and the handling of full memory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from peft_longlora.data.prefetch import prefetch
from peft_longlora.eval.run import Run
from peft_longlora.eval.tasks.task import Item, Task, with_protocol
from peft_longlora.hub.loading import is_out_of_memory

logger = logging.get_logger(__name__)


class Share:
    """Every n-th item of a task that no earlier run has finished.

    If an item can be started, it is finished only after the next one was started, so that a GPU never waits for this
    thread. If memory runs out, the rest of the label is left out; in most cases that is one length of a task.
    """

    def __init__(self, run: Run, task: Task, show_progress: bool):
        self.run, self.task, self.show_progress = run, task, show_progress
        self._pending = self._count = 0
        self._label: str | None = None
        self._place = ""  # of the items of this label, in `run.places`
        self._bar: tqdm | None = None
        self._has_room = True
        self._started: list[tuple[Item, Callable[[], dict[str, Any]]]] = []

    def measure(self) -> None:
        """Measure the share, and write the samples to the journal."""
        processes = self.run.processes
        try:
            for item in prefetch(self.task.items(self.run.subject)):
                if item.label != self._label:
                    self._begin_label(item.label)
                is_new = item.key not in self.run.places
                self._show(item)
                if is_new and item.key not in self.run.done:  # the user may have given a length twice
                    self._pending += 1
                    if self._has_room and self._pending % processes.count == processes.rank:
                        self._attempt(self._begin, item)
                self._bar.update(1)
            self._attempt(self._finish)
        finally:
            if self._bar is not None:
                self._bar.close()  # so that an error starts on a new line

    def _begin_label(self, label: str) -> None:
        self._attempt(self._finish)
        if self._bar is not None:
            self._bar.close()
        self._label, self._count, self._has_room, self._began = label, 0, True, time.perf_counter()
        self._place = with_protocol(label, self.task)
        columns = min(100, shutil.get_terminal_size().columns)  # 80 if the terminal does not give its size
        self._bar = tqdm(desc=label, disable=not self.show_progress, ncols=columns)

    def _show(self, item: Item) -> None:
        self.run.places[item.key] = self._place
        self._count += 1
        self._bar.total = max(self._count, round(self._count / max(item.progress, 1e-9)))

    def _begin(self, item: Item) -> None:
        try:
            rest = item.start() if item.start else item.measure
        finally:
            self._finish()
        self._started.append((item, rest))

    def _finish(self) -> None:
        for item, rest in self._started:
            record = rest()
            self.run.journal.write(record)
            self._clock(item, record)
        self._started.clear()

    def _attempt(self, step: Callable[..., None], *arguments: Item) -> None:
        try:
            return step(*arguments)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Here, because inside `except` the error still keeps the tensors of its frames alive.
        self._has_room = False
        self._started.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._bar.close()
        logger.warning(f"{self._place}: out of memory, left out.")

    def _clock(self, item: Item, record: dict[str, Any]) -> None:
        """Count the tokens and the time since the label's first item was ready."""
        entry = self.run.speed.setdefault(item.label, {"tokens": 0, "seconds": 0.0})
        entry["tokens"] += record.get("inputs") or record.get("tokens") or 0
        entry["seconds"] = round(time.perf_counter() - self._began, 3)

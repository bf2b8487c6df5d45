"""Ctrl-C, or a cluster's SIGTERM, ends training after the step, with a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopCallback(TrainerCallback):
    """Ends training after the step in which a signal came, and saves. A second Ctrl-C ends it at once.

    Attributes:
        signal: the signal that came; None if there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block signals are noted. Only the main thread of a process can do this."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(kind, self._note) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)

    def _note(self, kind: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = kind
        print(
            "\nStopping after this step, with a checkpoint (Ctrl-C again: at once, without one).",
            file=sys.stderr,
            flush=True,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save and stop if a signal came to any process."""
        came = self.signal is not None
        if args.world_size > 1:
            # Signals reach processes at different times, and all must stop after the same step.
            flag = torch.tensor([int(came)], device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            came = bool(flag.item())
        if came and state.global_step < state.max_steps:
            self.signal = self.signal or signal.SIGINT
            control.should_save = True
            control.should_training_stop = True
        return control

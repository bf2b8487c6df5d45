"""What a run says of itself at its start: its steps, when a checkpoint is kept, and about how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WORTH_SAYING = 60  # seconds; a shorter rest of a run is seen soon


class OutlookCallback(TrainerCallback):
    """Says how many steps are left and when checkpoints are kept, and after the first log how long the rest takes.

    A log waits for the device, so the time before it is that of whole steps.

    Args:
        say: prints a line. clock: seconds.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.perf_counter):
        self.say, self.clock = say, clock
        self._start: tuple[int, float] | None = None  # the step before, and the time; None: it is said

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say the steps and the checkpoints."""
        left = state.max_steps - state.global_step
        self.say(f"{left:,} steps to train; {_checkpoints(args, state)}.")
        self._start = state.global_step, self.clock()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say the time, once."""
        if self._start is None or state.global_step <= self._start[0]:
            return
        (step, before), self._start = self._start, None
        each = (self.clock() - before) / (state.global_step - step)
        left = state.max_steps - state.global_step
        if each * left >= WORTH_SAYING:
            self.say(f"A step takes about {each:.2g} s: about {_duration(each * left)} for the {left:,} steps left.")


def _checkpoints(args: TrainingArguments, state: TrainerState) -> str:
    strategy = args.save_strategy.value
    if strategy == "epoch":
        return "a checkpoint after every epoch"
    if strategy == "best":
        return "a checkpoint when the metric is better than before"
    if strategy == "steps" and (state.global_step // state.save_steps + 1) * state.save_steps < state.max_steps:
        return f"a checkpoint every {state.save_steps:,} steps and at the end"
    when = f"no checkpoint before the end (save_steps={state.save_steps})" if strategy == "steps" else "no checkpoints"
    return f"{when}, but Ctrl-C keeps one"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{seconds / 3600:.1f} h"

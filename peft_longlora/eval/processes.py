"""The processes that share a run. Called by `run`; asks accelerate only where there are several."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from peft_longlora.hub.loading import find_device


@dataclass(frozen=True)
class Processes:
    """This process among those that share a run: torchrun and `accelerate launch` start them."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None
    state: Any = None

    @classmethod
    def of_environment(cls, device: str | None = None) -> Processes:
        """From what the launcher set; a single process without it.

        Raises: ValueError: no such device, or one device for several processes.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device=find_device(device))
        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device={device!r}: each process takes a GPU of its own. Leave it out, or say cpu.")
        from accelerate import PartialState

        # Processes finish at different times, and the default of ten minutes would end the slower one's run.
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=7))
        return cls(state.process_index, state.num_processes, state.device, state)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all others to come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

"""The processes that share a run. Made by who calls `evaluate`; uses accelerate only if there are several."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from peft_longlora.hub.loading import find_device


@dataclass(frozen=True)
class Processes:
    """This process among the processes of a run, which torchrun or `accelerate launch` starts.

    Args:
        rank: the number of this process.
        count: the number of processes.
        device: of this process. None: not chosen yet.
        state: accelerate's, through which processes wait for each other; None for a single process.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None
    state: Any = None

    @classmethod
    def of_environment(cls, device: str | None = None) -> Processes:
        """Read the launcher's environment variables. Without a launcher there is a single process.

        Raises: ValueError: the device does not exist, or several processes would share one device.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device=find_device(device))
        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device={device!r}: each process takes its own GPU. Leave it out, or give cpu.")
        from accelerate import PartialState

        # Processes finish at different times. The default timeout of ten minutes would end the run.
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=7))
        return cls(state.process_index, state.num_processes, state.device, state)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.state is not None:
            self.state.wait_for_everyone()

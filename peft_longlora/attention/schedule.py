"""Which training forwards of a model are dense in every layer: one in n.

Held by the settings of a model's layers; `inputs`, which sees a model being called, begins each forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peft_longlora.kernels.groups import whole_number


@dataclass
class Schedule:
    """One training forward in n, the n-th, the 2n-th and so on, is dense.

    A training forward is a call of the whole model from outside, in training mode and with gradients. Evaluation,
    generation and the recomputation of gradient checkpointing are none. Each micro-batch of an accumulated step is one.

    Attributes:
        dense_every: n; 0 for no dense forwards, and then nothing is counted.
        training_forwards: how many there were, the one under way included.
        is_dense: whether the forward under way, or the last one, is dense.
    """

    dense_every: int = 0
    training_forwards: int = 0
    is_dense: bool = False

    def begin(self, training: bool) -> None:
        """A forward begins, from outside."""
        if self.dense_every:
            self._count(training and torch.is_grad_enabled())

    @torch.compiler.disable(
        reason="dense_every counts forwards, and compiled code would be compiled anew for each number"
    )
    def _count(self, is_training: bool) -> None:
        self.training_forwards += is_training
        self.is_dense = is_training and self.training_forwards % self.dense_every == 0


def check_dense_every(dense_every: Any) -> int:
    """The number, 0 for None; refuse what is no number of forwards. Raises: ValueError."""
    number = 0 if dense_every is None else whole_number(dense_every)
    if number is None or number < 0:
        raise ValueError(
            f"dense_every={dense_every!r} must be a whole number of training forwards, of which the last is dense; "
            f"None or 0 for no dense forwards."
        )
    return number

"""Which training forwards of a model are dense in every layer (one in n), and which they are, counted.

The settings of a model's layers hold it. `inputs` sees the calls of a model, and begins each forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peft_longlora.kernels.patterns import whole_number


@dataclass
class Schedule:
    """Makes one training forward in n dense: the n-th, the 2n-th and so on.

    A training forward is a call of the whole model from outside, in training mode and with gradients, that returns.
    Evaluation, generation and the recomputation of gradient checkpointing do not count, and neither does a call that is
    refused, raises or is interrupted. Each micro-batch of an accumulated step counts. A checkpoint around the whole
    model is refused: its recomputation is a call from outside.

    Attributes:
        dense_every: n. With 0 there are no dense forwards.
        training_forwards: the number of training forwards that are over. Nothing is counted if nothing depends on it.
        number: of the current training forward, or the last one.
        is_dense: whether the current forward, or the last one, is dense.
        skip_positions: whether positions skip in the others (`skips`).
        is_training: whether the current forward, or the last one, was counted.
    """

    dense_every: int = 0
    training_forwards: int = 0
    number: int = 0
    is_dense: bool = False
    skip_positions: bool = False
    is_training: bool = False

    @property
    def is_counting(self) -> bool:
        """Whether anything depends on the number of a forward."""
        return bool(self.dense_every) or self.skip_positions

    def begin(self, training: bool) -> None:
        """A forward begins that is called from outside. Raises: RuntimeError: as `_number`."""
        if self.is_counting:
            self._number(training and torch.is_grad_enabled())

    def end(self) -> None:
        """The forward has returned."""
        if self.is_counting:
            self._count()

    @torch.compiler.disable(reason="forwards are counted, and code would be compiled again for each number")
    def _count(self) -> None:
        if self.is_training:
            self.training_forwards = self.number

    @torch.compiler.disable(reason="as _count")
    def _number(self, is_training: bool) -> None:
        """Raises: RuntimeError: a backward computes the whole model again, and nobody knows for which forward."""
        if is_training and torch._C._current_autograd_node() is not None:
            raise RuntimeError(
                "dense_every and skip_positions go by the number of a forward, and a backward calls the whole model "
                "again (torch.utils.checkpoint around it?), which would be computed as another forward than the first "
                "time. Checkpoint its blocks instead: model.gradient_checkpointing_enable()."
            )
        self.number = self.training_forwards + is_training
        self.is_training = is_training
        self.is_dense = is_training and bool(self.dense_every) and self.number % self.dense_every == 0


def check_dense_every(dense_every: Any) -> int:
    """The number as an int, 0 for None. Raises: ValueError: it is not a number of forwards."""
    number = 0 if dense_every is None else whole_number(dense_every)
    if number is None or number < 0:
        raise ValueError(
            f"dense_every={dense_every!r} must be a whole number n: one training forward in n is dense. Use None or 0 "
            f"for no dense forwards."
        )
    return number

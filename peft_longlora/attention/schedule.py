"""Which training forwards of a model are dense in every layer (one in n), and which they are, counted.

The settings of a model's layers hold it. `inputs` sees the calls of a model, and begins each forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import logging

from peft_longlora.kernels.patterns import whole_number

logger = logging.get_logger(__name__)


@dataclass
class Schedule:
    """Makes one training forward in n dense: the n-th, the 2n-th and so on.

    A training forward is a call of the whole model from outside, in training mode and with gradients, that returns.
    Evaluation, generation, the base (`disable_adapter`) and the recomputation of gradient checkpointing do not count,
    and neither does a call that is refused, raises or is interrupted. Each micro-batch of an accumulated step counts. A
    checkpoint around the whole model is refused: its recomputation is a call from outside.

    A forward in training mode without gradients that reads the tokens of the last training forward runs as that one
    did: a loss compares both (DPO's reference). Other forwards without gradients are sparse, and do not skip.

    Attributes:
        dense_every: n. With 0 there are no dense forwards.
        training_forwards: the number of training forwards that are over. Nothing is counted if nothing depends on it.
        number: of the training forward that the current forward, or the last one, is or runs as.
        is_dense: whether the current forward, or the last one, is dense.
        skip_positions: whether positions skip in the others (`skips`).
        is_training: whether the current forward, or the last one, was counted.
        is_scheduled: whether it is a training forward, or runs as one.
        tokens: (B, S) ids of the current training forward, or the last one. last: its number and tokens once it is
            over.
        is_warned: whether a forward without gradients was warned of.
    """

    dense_every: int = 0
    training_forwards: int = 0
    number: int = 0
    is_dense: bool = False
    skip_positions: bool = False
    is_training: bool = False
    is_scheduled: bool = False
    tokens: torch.Tensor | None = field(default=None, repr=False, compare=False)
    last: tuple[int, torch.Tensor | None] = field(default=(0, None), repr=False, compare=False)
    is_warned: bool = field(default=False, repr=False, compare=False)

    @property
    def is_counting(self) -> bool:
        """Whether anything depends on the number of a forward."""
        return bool(self.dense_every) or self.skip_positions

    def begin(self, training: bool, tokens: torch.Tensor | None, is_replica: bool) -> None:
        """A forward begins that is called from outside.

        Args:
            training: whether it attends as in training. tokens: (B, S) ids that tell whether two forwards are compared,
                or None. is_replica: whether the model is one of the copies that nn.DataParallel runs at once.

        Raises: ValueError, RuntimeError: as `_number`.
        """
        if self.is_counting:
            self._number(training, tokens, is_replica)

    def end(self) -> None:
        """The forward has returned."""
        if self.is_counting:
            self._count()

    @torch.compiler.disable(reason="forwards are counted, and code would be compiled again for each number")
    def _count(self) -> None:
        if self.is_training:
            self.training_forwards = self.number
            self.last, self.tokens = (self.number, self.tokens), None

    @torch.compiler.disable(reason="as _count")
    def _number(self, training: bool, tokens: torch.Tensor | None, is_replica: bool) -> None:
        """Raises:
        RuntimeError: a backward computes the whole model again, and nobody knows for which forward.
        ValueError: the forward is one of several that nn.DataParallel runs at once, in no order.
        """
        self.is_training = training and torch.is_grad_enabled()
        if self.is_training and torch._C._current_autograd_node() is not None:
            raise RuntimeError(
                "dense_every and skip_positions go by the number of a forward, and a backward calls the whole model "
                "again (torch.utils.checkpoint around it?), which would be computed as another forward than the first "
                "time. Checkpoint its blocks instead: model.gradient_checkpointing_enable()."
            )
        if self.is_training and is_replica:
            raise ValueError(
                "dense_every and skip_positions go by the number of a forward, and nn.DataParallel, which a Trainer "
                "uses on several GPUs if nothing else is said, runs several forwards at once. Start the script with "
                "accelerate launch or torchrun, or give it one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        self.is_scheduled, self.number = self.is_training, self.training_forwards + self.is_training
        if self.is_training:
            # A copy, because data may be read into the same memory; ids are small.
            self.tokens = None if tokens is None else tokens.detach().clone()
        elif training and tokens is not None:
            number, seen = self.last
            self.is_scheduled = seen is not None and _are_equal(seen, tokens)
            self.number = number if self.is_scheduled else self.number
            self._warn()
        self.is_dense = self.is_scheduled and bool(self.dense_every) and self.number % self.dense_every == 0

    def _warn(self) -> None:
        """Warn once of a forward that may be compared with training forwards that run otherwise."""
        if not self.is_scheduled and not self.is_warned:
            self.is_warned = True
            logger.warning(
                "A forward in training mode without gradients is neither dense (dense_every) nor do its positions skip "
                "(skip_positions), unless it reads the tokens of the training forward before it. If a loss compares it "
                "with later training forwards, as GRPO's and PPO's do, leave dense_every and skip_positions out."
            )


def _are_equal(tokens: torch.Tensor, others: torch.Tensor) -> bool:
    return tokens.device == others.device and tokens.device.type != "meta" and torch.equal(tokens, others)


def check_dense_every(dense_every: Any) -> int:
    """The number as an int, 0 for None. Raises: ValueError: it is not a number of forwards."""
    number = 0 if dense_every is None else whole_number(dense_every)
    if number is None or number < 0:
        raise ValueError(
            f"dense_every={dense_every!r} must be a whole number n: one training forward in n is dense. Use None or 0 "
            f"for no dense forwards."
        )
    return number

"""A learning rate of their own for the modules that an adapter trains whole: embeddings and norms.

They start from trained weights, where LoRA starts from nothing, so they want a lower rate (docs/recipe.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.copies import wrappers_of


class LearningRatesMixin:
    """Before a Trainer in the list of bases: adds the argument `embedding_learning_rate`.

    Args:
        embedding_learning_rate: of the copies that `modules_to_save`, `train_embeddings`, `train_norms` and
            `rope_type="learned"` train; None: `learning_rate`, which is LoRA's. The Trainer's schedule scales both.
        args: of the trainer.
        kwargs: of the trainer.

    Raises:
        ValueError: the rate is not above 0, the adapter trains no module whole, or the optimizer was made elsewhere (as
            DeepSpeed does where its config has one).

    Example:
        >>> class RatesTrainer(LearningRatesMixin, Trainer): ...
        >>> trainer = RatesTrainer(model, arguments, train_dataset=rows, embedding_learning_rate=2.5e-4)
    """

    def __init__(self, *args: Any, embedding_learning_rate: float | None = None, **kwargs: Any):
        if embedding_learning_rate is not None and not _is_rate(embedding_learning_rate):
            raise ValueError(f"embedding_learning_rate={embedding_learning_rate!r} must be a number above 0, or None.")
        self.embedding_learning_rate = embedding_learning_rate
        super().__init__(*args, **kwargs)
        if embedding_learning_rate is None:
            return
        if not whole_parameters(self.model):
            raise ValueError(no_effect(embedding_learning_rate))
        if self.optimizer is not None:
            raise ValueError(
                f"embedding_learning_rate={embedding_learning_rate}: the optimizer was given in `optimizers`, with "
                f"rates of its own. Leave one of the two out."
            )

    def create_optimizer(self: Trainer | Any, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with groups of their own for what is trained whole; `model` as the Trainer's."""
        is_made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.embedding_learning_rate is not None and not is_made:
            whole = whole_parameters(self.model if model is None else model)
            split_groups(optimizer, whole, self.embedding_learning_rate)
        return optimizer


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def trains_whole(config: LongLoraConfig) -> bool:
    """Whether an adapter with this config trains modules whole."""
    learns_rope = config.rope_type == "learned"
    return bool(config.train_embeddings or config.train_norms or config.modules_to_save or learns_rope)


def no_effect(learning_rate: float) -> str:
    """What is wrong if nothing is trained whole."""
    return (
        f"embedding_learning_rate={learning_rate} has no effect: the adapter trains neither embeddings nor norms, nor "
        f"any other module whole. Leave it out, or set train_embeddings or train_norms."
    )


def whole_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The trained parameters of modules that an adapter trains whole."""
    return {one for wrapper in wrappers_of(model) for one in wrapper.parameters() if one.requires_grad}


def split_groups(optimizer: Any, parameters: set[nn.Parameter], learning_rate: float) -> None:
    """Give some parameters of an optimizer that has made no step groups of their own, behind the others.

    Raises: ValueError: the optimizer has no groups of parameters.
    """
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise ValueError(
            f"embedding_learning_rate={learning_rate}: {type(optimizer).__name__} has no groups of parameters (the "
            f"config of DeepSpeed makes the optimizer). Leave it out, or let the Trainer make the optimizer."
        )
    first, last = [], []
    for group in optimizer.param_groups:
        mine = [one for one in group["params"] if one in parameters]
        others = [one for one in group["params"] if one not in parameters]
        if others:
            first.append({**group, "params": others})
        if mine:
            last.append({**group, "params": mine, "lr": learning_rate})
    optimizer.param_groups[:] = [*first, *last]  # the Trainer logs the rate of the first

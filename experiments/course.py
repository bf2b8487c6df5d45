"""What changes from step to step of a cell's training: dense steps and layers, group sizes, weights.

`train` asks it before each step, and for each row. README.md beside it describes the options.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from work import dense_step_numbers

from peft_longlora import use_attention
from peft_longlora.attention.settings import settings_on


def cut_rows(
    rows: list[dict[str, list[int]]], parts: int | None, dense_every: int | None
) -> tuple[list[dict[str, list[int]]], list[float]]:
    """The rows of a training whose sparse steps take a part of a row each, so that they are more.

    Args:
        parts: of a row, all of one length. dense_every: one forward in so many is dense, and has a whole row.

    Returns: what each step trains on; and, for each step, the rows that were trained on before it.
    """
    if not parts:
        return rows, [float(number) for number in range(len(rows))]
    found, before = [], []
    for number, row in enumerate(rows):
        if dense_every and (len(found) + 1) % dense_every == 0:
            found.append(row)
            before.append(float(number))
            continue
        size = len(row["input_ids"]) // parts
        found += [{"input_ids": row["input_ids"][size * part :][:size]} for part in range(parts)]
        before += [number + part / parts for part in range(parts)]
    return found, before


class Course:
    """The course of one training: what is set before each step, and what a row of it looks like.

    Args:
        model: with its adapter. options: a cell's `training`. steps: of the optimizer.
        dense_every: of the adapter's config, whose dense forwards are counted here too, one a step.

    Raises: ValueError: layers that do not go round, or no token of a group that counts.
    """

    def __init__(self, model: nn.Module, options: dict[str, Any], steps: int, dense_every: int | None = None):
        self.model, self.options, self.blocks = model, options, ExitStack()
        self.settings = settings_on(model)
        self.layers = model.config.get_text_config().num_hidden_layers
        number, unscored = options.get("rotating_layers"), options.get("unscored")
        if number and (number > self.layers or self.layers % number):
            raise ValueError(f"rotating_layers={number} must divide {self.layers}, the number of this model's layers.")
        if unscored and unscored >= (smallest := min(options.get("group_sizes") or [self.settings.group_size])):
            raise ValueError(f"unscored={unscored} must be below {smallest}, the tokens of the smallest group.")
        self.forced = dense_step_numbers(steps, None, options.get("dense_steps"))
        self.dense = self.forced | dense_step_numbers(steps, dense_every, None)

    @property
    def period(self) -> int:
        """Steps after which the same kinds of steps come again, 1 where that is not so."""
        number, sizes = self.options.get("rotating_layers"), self.options.get("group_sizes")
        every = (self.options.get("dense_steps") or {}).get("every")
        return every or len(sizes or ()) or (self.layers // number if number else 1)

    def begin(self, step: int) -> None:
        """Set the attention of a step, counted from 0."""
        if step in self.forced:
            self.blocks.enter_context(use_attention(self.model, "dense", dense_attention="fastest"))
        if self.options.get("group_sizes"):
            self.settings.given_size = self.group_size(step)
        if self.options.get("rotating_layers"):
            self.settings.dense_layers = frozenset(self.dense_layers(step))

    def end(self) -> None:
        """Undo what lasts for one step."""
        self.blocks.close()

    def group_size(self, step: int) -> int:
        """G of a step: the sizes given, in turn, or the adapter's."""
        sizes = self.options.get("group_sizes")
        return sizes[step % len(sizes)] if sizes else self.settings.group_size

    def dense_layers(self, step: int) -> list[int]:
        """Layers that are dense in a step: n of them, evenly spaced, the next ones in the next step."""
        number = self.options.get("rotating_layers")
        if not number:
            return sorted(self.settings.dense_layers)
        turns = self.layers // number
        return list(range(step % turns, self.layers, turns))

    def weigh(self, step: int, losses: torch.Tensor) -> torch.Tensor:
        """The loss of a step from those of its tokens, (S - 1,).

        `unscored`: the first tokens of each group but the first, which see little, do not count in a sparse step.
        `dense_weight`: what a dense step counts beside a sparse one.
        """
        if step in self.dense:
            return losses.mean() * (self.options.get("dense_weight") or 1)
        if not self.options.get("unscored"):
            return losses.mean()
        place, group_size = torch.arange(len(losses), device=losses.device), self.group_size(step)
        counts = (place < group_size) | (place % group_size >= self.options["unscored"])
        return (losses * counts).sum() / counts.sum()

    def share(self, step: int, layer: Callable[[int], float]) -> float:
        """The share of full attention's pairs that a step computes; `layer` is that of a sparse layer, for a G."""
        if step in self.dense:
            return 1.0
        dense = len(self.dense_layers(step))
        return (dense + (self.layers - dense) * layer(self.group_size(step))) / self.layers

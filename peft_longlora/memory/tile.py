"""Feed-forward layers by tiles of tokens. Their inner tensors are about 3 times as wide as the model's.

With tiles, the inner tensors of a whole row never exist. A tile is computed again in its backward, so a tiled layer in
a checkpointed block runs forward three times. This is for rows that do not fit otherwise. Called by `blocks`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Tiled:
    """Mixed into a module's class: its forward computes `tile_tokens` tokens at a time, each again in the backward."""

    tile_tokens: int
    untiled_class: type[nn.Module]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, S, hidden) -> (B, S, hidden)."""
        if not (self.training and torch.is_grad_enabled()) or hidden.shape[1] <= self.tile_tokens:
            return super().forward(hidden)
        forward = super().forward
        tiles = [checkpoint(forward, tile, use_reentrant=False) for tile in hidden.split(self.tile_tokens, dim=1)]
        return torch.cat(tiles, dim=1)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and copy must be told how to make it again.
        return _rebuild, (self.untiled_class,), self.__getstate__()


@cache
def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Tiled, kind), {"__module__": kind.__module__, "untiled_class": kind})


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(_class_of(kind))


def find_feed_forwards(block: nn.Module) -> list[nn.Module]:
    """The feed-forward layers of a block: modules that transformers calls MLP, which work on single tokens.

    Mixtures of experts are left out, because they route all tokens of a batch together.
    """
    return [
        module
        for module in block.modules()
        if type(module).__name__.endswith("MLP") and any(isinstance(child, nn.Linear) for child in module.children())
    ]


def tile(module: nn.Module, tokens: int | None) -> None:
    """Compute a feed-forward layer by tiles of `tokens` tokens; None: whole rows again."""
    if isinstance(module, Tiled):
        module.__class__ = module.untiled_class
        del module.tile_tokens
    if tokens is not None:
        module.__class__ = _class_of(type(module))
        module.tile_tokens = tokens

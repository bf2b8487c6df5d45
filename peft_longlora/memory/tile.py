"""Feed-forward layers by tiles of tokens. Their inner tensors are about 3 times as wide as the model's.

With tiles, the inner tensors of a whole row never exist: each tile is computed again in its backward. In a checkpointed
block this costs no additional forward. The layer's input is the last tensor that the block saves, so when the block is
computed again, torch stops there, before the first tile. Called by `blocks`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from peft_longlora.rope.mixing import Mixin, mix, unmix


class _Save(torch.autograd.Function):
    """Returns its input, and saves it for the tiles."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


class Tiled(Mixin):
    """Mixed into a module's class: a call computes `tile_tokens` tokens at a time, of all rows together, each again in
    the backward.

    The call is changed and not the forward, because Liger gives single modules a forward of their own.
    """

    tile_tokens: int

    def __call__(self, hidden: torch.Tensor, *numbers: Any) -> torch.Tensor:
        """(B, S, hidden) -> (B, S, hidden), or without B; `numbers` are the same for each token (Zamba2's layer)."""
        # Tokens of each row: a tile of a batch holds some of every row.
        tokens = max(1, self.tile_tokens // max(1, hidden.shape[:-2].numel()))
        if not self.training or hidden.shape[-2] <= tokens:
            return super().__call__(hidden, *numbers)
        if any(isinstance(one, torch.Tensor) for one in numbers):
            return super().__call__(hidden, *numbers)
        forward = partial(_with_numbers, super().__call__, numbers)
        if not torch.is_grad_enabled():  # the block after this one needs its input again (`offload=2` and more)
            return torch.cat([forward(tile) for tile in hidden.split(tokens, -2)], dim=-2)
        if not hidden.requires_grad:
            return forward(hidden)
        tiles = _Tiles(forward, _Save.apply(hidden), tokens)
        # A tile is named by a number, and what torch saves to enter a tile is kept from the block's own checkpoint:
        # otherwise the last tile's would be the last tensor that the block saves.
        with saved_tensors_hooks(_same, _same):
            outs = [checkpoint(tiles.run, index, use_reentrant=False) for index in range(len(tiles.rows))]
        return torch.cat(outs, dim=-2)


def _with_numbers(forward: Any, numbers: tuple[Any, ...], tile: torch.Tensor) -> torch.Tensor:
    return forward(tile, *numbers)


class _Tiles:
    """The tiles of one row: in the forward parts of the input, in the backward parts of the saved input."""

    def __init__(self, forward: Any, saved: torch.Tensor, tokens: int):
        self.forward, self.tokens = forward, tokens
        self.node = saved.grad_fn  # holds the input, or what a checkpointed block computes it from
        self.rows: list[torch.Tensor | None] = list(saved.split(tokens, dim=-2))

    def run(self, index: int) -> torch.Tensor:
        """One tile, the first time and again."""
        if self.rows[index] is None:
            whole = self.node.saved_tensors[0]  # once for all tiles, because it may be computed only once
            self.rows = [row.requires_grad_() for row in whole.detach().split(self.tokens, dim=-2)]
        tile, self.rows[index] = self.rows[index], None
        return self.forward(tile)


def find_feed_forwards(block: nn.Module) -> list[nn.Module]:
    """The feed-forward layers of a block: modules that transformers calls MLP, which work on single tokens.

    Mixtures of experts are left out, because they route all tokens of a batch together.
    """
    return [
        module
        for module in block.modules()
        if type(module).__name__.endswith("MLP") and any(map(_is_linear, module.children()))
    ]


def _is_linear(module: nn.Module) -> bool:
    while isinstance(module, BaseTunerLayer):  # an adapter on the layer
        module = module.base_layer
    return isinstance(module, nn.Linear)


def tile(module: nn.Module, tokens: int | None) -> None:
    """Compute a feed-forward layer by tiles of `tokens` tokens; None: whole rows again."""
    if isinstance(module, Tiled):
        unmix(module)
        del module.tile_tokens
    if tokens is not None:
        mix(module, Tiled)
        module.tile_tokens = tokens

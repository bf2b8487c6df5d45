"""The loss of each token of long rows, without the logits of a whole row.

A Llama's logits of 32768 tokens over 49152 words are 6 GB in float32, and a step holds them several times. Here the
model runs as it is (so every hook that counts or follows its forwards fires) but for its output layer, which sees the
last token alone; the output layer and the loss then take the last hidden states piece by piece, and a training step
computes each piece again in its backward. Right for models whose logits are the output layer's, unscaled and uncapped.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

PIECE = 8192


def hidden_states(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, S, hidden) as the output layer sees them."""
    output = model(input_ids=input_ids, use_cache=False, logits_to_keep=1, output_hidden_states=True)
    return output.hidden_states[-1]


def output_layer(model: nn.Module) -> nn.Module:
    """The output layer in force: an adapter's copy where embeddings are tied and trained."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_output_embeddings()


def token_losses(model: nn.Module, input_ids: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """Cross entropy of tokens 1 to S - 1, each given those before it: (1, S) -> (S - 1,), float32."""
    hidden = hidden_states(model, input_ids) if hidden is None else hidden
    head = output_layer(model)

    def losses(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(head(states).float(), targets, reduction="none")

    pieces = []
    for start in range(0, input_ids.shape[1] - 1, PIECE):
        stop = min(start + PIECE, input_ids.shape[1] - 1)
        piece = hidden[0, start:stop], input_ids[0, start + 1 : stop + 1]
        is_trained = torch.is_grad_enabled() and hidden.requires_grad
        pieces.append(checkpoint(losses, *piece, use_reentrant=False) if is_trained else losses(*piece))
    return torch.cat(pieces)

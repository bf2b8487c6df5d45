"""One training step of `scaling.py`: the batch of a rank, the loss, the backward and what the ranks add up."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from peft_longlora import use_attention
from peft_longlora.sequence import shard_batch

CHUNK = 8192  # tokens of the loss at a time
NAMES = ("input_ids", "position_ids", "shift_labels")


class LossOf(nn.Module):
    """A PEFT model of Llama that gives the loss: one module, so that FSDP2 sees one forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, shift_labels: torch.Tensor, labels: int
    ) -> torch.Tensor:
        """The sum of this rank's losses over the number of all labels; logits for some tokens at a time.

        Args:
            input_ids, position_ids, shift_labels: (1, S) of this rank. labels: their number on all ranks.
        """
        base = self.model.get_base_model()
        embeddings = base.model.embed_tokens(input_ids).requires_grad_()  # or checkpoints have no gradient
        hidden = base.model(inputs_embeds=embeddings, position_ids=position_ids, use_cache=False).last_hidden_state[0]

        def part(hidden, targets):
            return F.cross_entropy(base.lm_head(hidden).float(), targets, reduction="sum")

        parts = zip(hidden.split(CHUNK), shift_labels[0].split(CHUNK), strict=True)
        return sum(checkpoint(part, *one, use_reentrant=False) for one in parts) / labels


def batch_of(attention: str, tokens: int, vocabulary: int, mesh: DeviceMesh, device: torch.device) -> dict:
    """This rank's part of one row of `tokens` tokens; alone, a row of its own of as many as its part would be."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    tokens = tokens // ranks if attention == "alone" else tokens
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    batch = shard_batch(dict(input_ids=ids, labels=ids), *((0, 1) if attention in ("alone", "ring") else (rank, ranks)))
    return {name: batch[name].to(device) for name in NAMES}


def backward(loss: torch.Tensor, parameters: list[nn.Parameter], ranks: int) -> None:
    """Gradients of the sum of all ranks' losses, in every copy of a parameter or in the shards of it.

    FSDP2 averages over the ranks, so there the loss is multiplied by their number.
    """
    is_sharded = isinstance(parameters[0], DTensor)
    (loss * ranks if is_sharded else loss).backward()
    if not is_sharded:
        for parameter in parameters:
            dist.all_reduce(parameter.grad)


def step(model: LossOf, optimizer: torch.optim.Optimizer, attention: str, batch: dict, labels: int, mesh: DeviceMesh):
    """One optimiser step; returns this rank's part of the loss."""
    around = nullcontext()
    if attention == "ring":
        from torch.distributed.tensor.experimental import context_parallel

        batch = {name: x.clone() for name, x in batch.items()}
        around = context_parallel(mesh, buffers=list(batch.values()), buffer_seq_dims=[1, 1, 1])
    with around, use_attention(model.model, "dense") if attention == "ulysses" else nullcontext():
        loss = model(**batch, labels=labels)
        backward(loss, optimizer.param_groups[0]["params"], mesh.size())
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()

"""All means together under DDP, FSDP2 and ranks that share a sequence, against a plain step of one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft_longlora.memory import MemoryPlan, checkpoint_blocks, fit
from peft_longlora.sequence import parallelize_sequence, shard_batch
from tests.helpers.batches import batch_of
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import extend, make
from tests.memory.test_steps import ALL


def gradients(model) -> dict[str, torch.Tensor]:
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in named.items()}


def step(way: str, ranks: int) -> float:
    """The largest difference of a gradient, relative to the largest of its weight."""
    model = extend(make(num_hidden_layers=3), group_size=16, init_lora_weights=False).train()
    batch = batch_of("packed")
    labels = (batch["labels"][:, 1:] != -100).sum()
    model(**batch, num_items_in_batch=labels, use_cache=False).loss.backward()
    truth = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad(set_to_none=True)
    checkpoint_blocks(model, **ALL)
    mesh = init_device_mesh("cpu", (ranks,))
    wrapped, scale = model, 1
    if way == "DDP":
        wrapped = DistributedDataParallel(model)
    else:
        if way == "shared sequence":
            parallelize_sequence(model, mesh)
            batch, scale = shard_batch(batch, mesh.get_local_rank(), ranks), ranks
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    (wrapped(**batch, num_items_in_batch=labels, use_cache=False).loss * scale).backward()
    found = gradients(wrapped)
    assert found.keys() == truth.keys()
    return max(((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-6)).item() for n, g in truth.items())


def plans(_: int) -> MemoryPlan:
    """A plan that differs from rank to rank, as measurements do."""
    mine = MemoryPlan(1000 + dist.get_rank(), 10**9, 0, 1.0, 1.0, 1.0, 1.0, 1.0, 4)
    return fit._of_first_rank(mine, None)


@pytest.mark.slow
def test_ranks_take_the_plan_of_the_first():
    for found in run_ranks(2, plans, 0):
        assert found[0].length == 1000 and found[1] is None


def ways(ranks: int) -> dict[str, float]:
    return {way: step(way, ranks) for way in ("DDP", "FSDP2", "shared sequence")}


@pytest.mark.slow  # 10 seconds on idle cores
def test_gradients_on_two_ranks():
    for found in run_ranks(2, ways, 2):
        assert found == {way: pytest.approx(0, abs=2e-5) for way in ("DDP", "FSDP2", "shared sequence")}

"""Positions of several axes (Qwen-VL) where ranks share a row: those that tell its text are taken, others refused."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from peft_longlora import configure_attention
from peft_longlora.sequence import parallelize_sequence, shard_batch
from tests.helpers.ranks import run_ranks
from tests.whole.test_many_axes import make

IDS = torch.randint(10, 60, (1, 40), generator=torch.Generator().manual_seed(0))
# (1, S); time, height and width alone; none, of which the model makes three; the text's before the three
AXES = {"the text's": None, "three": 3, "none": 0, "the text's and three": 4}


@torch.no_grad()
def compare(name: str) -> dict[str, float | str]:
    """The largest difference of logits to one process, or what was said."""
    mesh, model, found = init_device_mesh("cpu", (2,)), make(name).train(), {}
    configure_attention(model, group_size=16)
    wanted = model(input_ids=IDS, use_cache=False).logits
    parallelize_sequence(model, mesh)
    for kind, axes in AXES.items():
        call = shard_batch(dict(input_ids=IDS), mesh.get_local_rank(), 2)
        if axes == 0:
            del call["position_ids"]
        elif axes:
            call["position_ids"] = call["position_ids"].expand(axes, 1, -1)
        try:
            own = model(**call, use_cache=False).logits.contiguous()
        except ValueError as error:
            found[kind] = str(error)
            continue
        whole = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(whole, own)
        found[kind] = (torch.cat(whole, dim=1) - wanted).abs().max().item()
    return found


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_only_positions_of_the_text_tell_a_rank_its_place(name):
    for found in run_ranks(2, compare, name):
        assert found["the text's"] < 1e-4 and found["the text's and three"] < 1e-4
        assert "three axes" in found["three"] and "(4, 1, S)" in found["three"]
        assert "without position_ids" in found["none"]

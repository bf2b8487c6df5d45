"""Every model type whose ranks share a row computes what one process computes, or is refused before its first step.

All that are supported (docs/architectures.md) are tried: about a minute on two cores.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers import CONFIG_MAPPING

from peft_longlora import configure_attention
from peft_longlora.architecture import find_attention_modules
from peft_longlora.sequence import parallelize_sequence, shard_batch
from peft_longlora.sequence.layer import _refuse_count
from tests.helpers.every_config import tiny_model
from tests.helpers.every_page import RESULTS
from tests.helpers.ranks import run_ranks

RANKS, LENGTH = 2, 160
SUPPORTED = [
    row["type"]
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    if row["kind"] == "causal" and row["result"] in ("supported", "conditional")
]
# Latent attention, whose values are narrower than its keys: the kernel for CPUs has none such, those for GPUs have.
REFUSALS = ("a recurrent state or a convolution", "counts the tokens of a row by itself", "value heads are as wide")


def compare(names: list[str]) -> dict[str, float | str]:
    """The largest difference of logits, as a share of their size; or the message of the refusal."""
    transformers.logging.set_verbosity_error()
    mesh, found = init_device_mesh("cpu", (RANKS,)), {}
    ids = torch.randint(3, 97, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    for name in names:
        model = tiny_model(name).train()
        configure_attention(model, group_size=16)
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits
            try:
                parallelize_sequence(model, mesh)
                call = shard_batch(dict(input_ids=ids), mesh.get_local_rank(), RANKS)
                own = model(**call, use_cache=False).logits.contiguous()
            except NotImplementedError as error:
                found[name] = str(error)
                continue
        whole = [torch.empty_like(own) for _ in range(RANKS)]
        dist.all_gather(whole, own)
        found[name] = ((torch.cat(whole, dim=1) - wanted).abs().max() / wanted.std()).item()
    return found


@pytest.mark.slow
def test_two_ranks_are_one_process_or_refuse():
    names = [name for name in SUPPORTED if name in CONFIG_MAPPING]
    for found in run_ranks(RANKS, compare, names):
        said = {name: each for name, each in found.items() if isinstance(each, str)}
        assert not {n: each for n, each in said.items() if not any(part in each for part in REFUSALS)}
        assert not {n: each for n, each in found.items() if n not in said and not each < 3e-3}
        assert {"llama4_text", "jamba"} & set(names) <= said.keys() and not {
            "afmoe",
            "beam",
            "gemma4_text",
        } & said.keys()


def test_a_layer_that_counts_is_refused_where_its_count_matters():
    """As it would count from 0 on each rank."""
    layer = next(iter(find_attention_modules(tiny_model("llama4_text")).values()))
    assert layer.floor_scale == 64
    call = SimpleNamespace(module=layer, query=torch.empty(1, 4, 31, 8))
    _refuse_count(call, ranks=2)
    with pytest.raises(NotImplementedError, match=r"Llama4TextAttention\) counts the tokens .* of more than 63 tokens"):
        _refuse_count(call, ranks=3)

"""Layers with a sliding window, chunks or sinks, in models whose ranks share a sequence: those of one process."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from peft_longlora import configure_attention
from peft_longlora.kernels.groups import find_documents
from peft_longlora.sequence import parallelize_sequence, shard_batch
from peft_longlora.sequence.edges import Edges
from peft_longlora.sequence.window import plan_window
from tests.attention.test_local import PACKED, ROW, TYPES, make
from tests.helpers.ranks import run_ranks
from tests.helpers.releases import checkpoint_activations

KINDS = [("s2", True, True), ("full", True, False), ("s2", False, False)]  # pattern, trains, packed


def found_by(name, pattern, training, packed, mesh, tokens=ROW.shape[1]):
    """Logits, and gradients summed over the ranks; of one process if there is no mesh."""
    model = make(name)
    if pattern == "full":
        configure_attention(model, pattern=pattern)
    model.train(training)
    call = {name: x[:, :tokens] for name, x in (PACKED if packed else dict(input_ids=ROW)).items()}
    length = tokens
    if mesh is not None:
        checkpoint_activations(model, use_reentrant=False)
        parallelize_sequence(model, mesh)
        call = shard_batch(call, mesh.get_local_rank(), mesh.size())
    logits = model(**call, use_cache=False).logits
    real = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
    logits[real].sin().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if mesh is None:
        return logits.detach(), grads
    whole = [torch.empty_like(logits) for _ in range(mesh.size())]
    dist.all_gather(whole, logits.detach().contiguous())
    for grad in grads.values():
        dist.all_reduce(grad)
    return torch.cat(whole, dim=1)[:, :length], grads


def compare(ranks, names, kinds=KINDS, lengths=(ROW.shape[1],)):
    mesh, errors = init_device_mesh("cpu", (ranks,)), {}
    for case in product(names, kinds, lengths):
        name, kind, tokens = case
        alone, shared = (found_by(name, *kind, x, tokens) for x in (None, mesh))
        pairs = [(alone[0], shared[0]), *((grad, shared[1][n]) for n, grad in alone[1].items())]
        errors[case] = max(((a - b).abs().max() / (a.abs().max() + 1e-3)).item() for a, b in pairs)
    return errors


EVERY = pytest.param(2, list(TYPES), marks=pytest.mark.slow), pytest.param(3, list(TYPES), marks=pytest.mark.slow)


@pytest.mark.parametrize(("ranks", "names"), [(3, ["gpt_oss"]), *EVERY], ids=["gpt_oss on 3", "all on 2", "all on 3"])
def test_losses_and_gradients_are_those_of_one_process(ranks, names):
    for errors in run_ranks(ranks, compare, ranks, names):
        assert not {case: error for case, error in errors.items() if not error < 1e-3}


@pytest.mark.parametrize("name", [name for name in TYPES if name in ("gpt_oss", "llama4_text")])
def test_a_stretch_is_no_longer_than_the_window_or_the_chunks(name):
    """Alone it does not show which of the two the layer has: both are 5 tokens long, stretches from 3 on."""
    for errors in run_ranks(2, compare, 2, [name], KINDS[:1], (6, 8, 10)):
        assert len(errors) == 3 and not {case: error for case, error in errors.items() if not error < 1e-3}


def test_who_sends_what():
    """Two documents on three ranks of 6 tokens, a window of 9: the first ends with rank 1's second token."""
    segments = torch.tensor([[1] * 8 + [2] * 10])
    documents = [find_documents(segments[:, i : i + 6]) for i in (0, 6, 12)]
    edges = [Edges(6, 6, 6, 0, 5, 9, 2), Edges(6, 2, 4, 6, 3, 9, 2), Edges(6, 6, 6, 4, 9, 9, 2)]
    plans = [plan_window(edges, rank, documents[rank], 9) for rank in range(3)]
    assert [plan.needs for plan in plans] == [0, 6, 4]
    assert plans[0].sends == (((0, 0),), ((0, 6),), ((0, 0),)) and plans[1].sends[2] == ((2, 6),)
    assert plans[2].receives == (((0, 0),), ((0, 4),), ((0, 0),))
    assert plans[1].cuts.groups().straight == (0, 8, 12) and plans[2].cuts.groups().straight == (0, 10)

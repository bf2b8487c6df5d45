"""What trained embeddings take of a step's peak, against the bytes that real steps hold on a CPU."""

import gc

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from peft_longlora.memory import fit, fit_memory
from peft_longlora.memory.estimate import Shape, Training, fixed_parts, late_bytes
from tests.helpers.held_bytes import Held, as_gpu
from tests.helpers.tiny import extend, make

VOCABULARY, TOKENS = 60_000, 512
TABLE = VOCABULARY * 32 * 4  # bytes; much more than the blocks of such a row hold


def loss(model, ids):
    """As a fused one: no logits of the whole row."""
    return model(input_ids=ids, logits_to_keep=8).logits.float().logsumexp(-1).sum()


def tied_or_not(held, tied, **settings):
    base = make(vocab_size=VOCABULARY, num_hidden_layers=1, tie_word_embeddings=tied)
    model = extend(base, context_length=TOKENS, group_size=64, **settings).train()
    for parameter in model.parameters():
        held.add(parameter)
    return model


def most(held, model, batches, ids):
    """Bytes at the peak of the third optimiser step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(3):
        held.forget()
        for _ in range(batches):
            loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return held.most


@pytest.fixture
def held():
    gc.collect()
    with Held() as held:
        yield held


@pytest.fixture
def rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(("tied", "trained"), [(False, True), (True, True), (False, False)])
def test_the_expected_peak_is_that_of_a_training(monkeypatch, held, tied, trained, batches):
    as_gpu(held, monkeypatch, shortest=64)
    model = tied_or_not(held, tied, train_embeddings=trained)
    plan = fit_memory(model, TOKENS, 10**11, loss=loss, liger=False, accumulates=batches > 1)
    measured = most(held, model, batches, torch.randint(VOCABULARY, (1, TOKENS)))
    assert plan.peak == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("batches", [1, 2])
def test_buckets_of_ddp_are_beside_the_gradients(monkeypatch, held, rank, batches):
    as_gpu(held, monkeypatch, shortest=64)
    model = tied_or_not(held, False)
    with monkeypatch.context() as patched:
        patched.setattr(dist, "get_world_size", lambda: 2)
        patched.setattr(fit, "_of_first_rank", lambda *plans: plans)
        plan = fit_memory(model, TOKENS, 10**11, loss=loss, liger=False, accumulates=batches > 1)
    ids = torch.randint(VOCABULARY, (1, TOKENS))
    measured = most(held, DistributedDataParallel(model), batches, ids)
    assert plan.peak == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_estimate_counts_the_same_gradients(held, tied, keeps):
    """In tables: while blocks are computed, and when they are through."""
    model, seen = tied_or_not(held, tied), []

    def watch(_module, _given, out):
        out.register_hook(lambda _: seen.append(held.now) or held.forget())

    model.get_input_embeddings().register_forward_hook(watch)
    before, ids = held.now, torch.randint(VOCABULARY, (1, 64))
    for _ in range(1 + keeps):
        loss(model, ids).backward()
    shape, training = Shape.of(model.config), Training(4, keeps_gradients=keeps)
    gradients = fixed_parts(shape, training)["gradients"]
    assert (seen[-1] - before) / TABLE == pytest.approx(gradients / TABLE, abs=0.05)
    assert (held.most - before) / TABLE == pytest.approx((gradients + late_bytes(shape, training)) / TABLE, abs=0.05)

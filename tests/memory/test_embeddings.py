"""What trained embeddings take of a step's peak, against the bytes that real steps hold on a CPU."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from peft_longlora.memory import fit, fit_memory
from peft_longlora.memory.blocks import find_blocks
from peft_longlora.memory.estimate import Shape, Training, fixed_parts, late_bytes, loss_fixed
from peft_longlora.memory.peaks import measure_peaks
from tests.helpers.fused_loss import use_fused_loss
from tests.helpers.held_bytes import as_gpu, loss
from tests.helpers.tiny import extend, make

VOCABULARY, TOKENS = 60_000, 512
TABLE = VOCABULARY * 32 * 4  # bytes; much more than the blocks of such a row hold


def fused(autocast):
    """A loss that reads the output layer's matrix, as Liger's does."""

    def loss(model, ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(input_ids=ids, labels=ids).loss

    return loss


def tied_or_not(held, tied, sizes=None, **settings):
    base = make(**{**dict(vocab_size=VOCABULARY, num_hidden_layers=1), **(sizes or {})}, tie_word_embeddings=tied)
    model = extend(base, context_length=TOKENS, group_size=64, **settings).train()
    for parameter in model.parameters():
        held.add(parameter)
    return model


def most(held, model, batches, ids, loss=loss):
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


@pytest.mark.parametrize(("autocast", "budget"), [(False, 10**11), (True, 9_500_000)])
def test_a_fused_loss_of_tied_embeddings_hides_nothing_of_the_blocks(monkeypatch, held, autocast, budget):
    """It is the peak of short steps, and the blocks are that of a long one."""
    as_gpu(held, monkeypatch, shortest=64)
    sizes = dict(vocab_size=6000, num_hidden_layers=2, intermediate_size=128, dtype=torch.bfloat16)
    model, length, loss = use_fused_loss(tied_or_not(held, True, sizes)), 4 * TOKENS, fused(autocast)
    short = measure_peaks(model, 64, loss)
    assert short.loss > short.blocks
    plan = fit_memory(model, length, budget, loss=loss, liger=False)
    measured = most(held, model, 1, torch.randint(6000, (1, length)), loss)
    assert plan.peak == pytest.approx(measured, rel=0.01) and measured < budget
    assert plan.free < 2 or budget == 10**11


@pytest.mark.parametrize("autocast", [False, True])
def test_the_estimate_covers_a_fused_loss_of_tied_embeddings(held, autocast):
    """In tables of single precision: autocast holds two rounded ones beside the gradient."""
    model = use_fused_loss(tied_or_not(held, True, dict(dtype=torch.bfloat16)))
    seen, before, ids = [], held.now, torch.randint(VOCABULARY, (1, 64))
    last = find_blocks(model)[-1]
    last.register_forward_hook(lambda _, given, out: out.register_hook(lambda _: seen.append(held.most)) and None)
    held.forget()
    fused(autocast)(model, ids).backward()
    shape, training = Shape.of(model.config), Training(4)
    expected = fixed_parts(shape, training)["gradients"] + loss_fixed(shape, training)
    found = (seen[0] - before) / TABLE
    assert found == pytest.approx(2 if autocast else 1.5, abs=0.05) and found < expected / TABLE + 0.05


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

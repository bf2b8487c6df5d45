"""What a memory plan chooses, against every other choice; and on a GPU, what it expects against what is measured."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of
from peft_longlora.memory import fit, fit_memory
from peft_longlora.memory.peaks import Peaks
from peft_longlora.memory.plan import MEANS, fill
from tests.helpers.measured_gpu import GIB, NAMED, Machine, plan
from tests.helpers.tiny import extend, make


@pytest.mark.parametrize("budget", [GIB // 4, GIB // 2, GIB, 2 * GIB])
@pytest.mark.parametrize("length", [2000, 5000])
@pytest.mark.parametrize("means", MEANS, ids=str)
@pytest.mark.parametrize("host", [0, 10**8, 10**9])
def test_no_other_choice_is_faster(budget, length, means, host):
    chosen = fill(plan(length, budget, host, means))
    others = []
    for free in range(9):
        for keep in range(9 - free):
            for in_host in range(9 - free - keep if means.get("offload") else 1):
                one = replace(chosen, free=free, keep=keep, keep_in_host=in_host)
                at_loss = 60_000 + free * 40_000 if free else 0
                peak = GIB // 4 + length * (max(100_000 + 8_000 * (in_host > 0 and not keep), at_loss) + 8_000 * keep)
                assert one.peak == peak
                if one.fits:
                    assert peak <= budget and one.host <= host
                    others.append(one)
    assert chosen.fits == bool(others)
    if others:
        assert chosen.work == min(one.work for one in others)


def test_what_waits_in_the_host():
    assert plan(means=dict(offload=True), keep_in_host=3).host == 1000 * (8 * 4000 + 3 * 8000)
    assert plan(means=dict(offload=2), free=1).host == 1000 * 4 * 4000
    assert plan(free=1).host == 0


@pytest.mark.parametrize("length", [23_000, 28_000, 36_000, 44_000, 60_000, 80_000, 85_000])
def test_the_fastest_means_that_fit_are_taken(monkeypatch, length):
    machine = Machine(monkeypatch)
    found = fit_memory(extend(make()), length, NAMED)
    trained = sum(p.numel() for p in extend(make()).parameters() if p.requires_grad)
    fitting = []
    for means in MEANS:
        for free, keep, in_host in product(range(3), repeat=3):
            options = dict(free=free, keep=keep, keep_in_host=in_host, **means)
            machine.now, chosen = options, machine.now
            fits_gpu = machine.peak(None, length, None) + 8 * trained <= 10**10
            machine.now = chosen
            every = int(means.get("offload", 0))
            # More than True is tried only if nothing before it fits.
            is_last = every > 1 and any(int(o.get("offload", 0)) < every for _, o in fitting)
            if fits_gpu and not is_last and free + keep + in_host <= 2 and (means.get("offload") or not in_host):
                again = 0.86 * (2 - free) - 0.22 * (keep + in_host)
                slower = 0.02 * bool(means) + 0.01 * bool(every) + 0.5 * max(0, every - 1)
                fitting.append((round(again + slower * (2 - free), 6), options))
    fastest = min(work for work, _ in fitting)
    assert machine.now == found.options and found.options in [one for work, one in fitting if work == fastest]
    assert found.peak == pytest.approx(machine.peak(None, length, None) + 8 * trained, rel=1e-3)


def test_gradients_that_are_summed_stay(monkeypatch):
    Machine(monkeypatch)
    model = extend(make())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    once, summed = (fit_memory(model, 60_000, NAMED, accumulates=value).peak for value in (False, True))
    assert summed - once == 4 * trained


def test_the_host_has_an_end_too(monkeypatch):
    """Blocks of 64 bytes a token: every second one's input waits, or every third one's, if all are too much."""
    for layers, room, every in ((2, 100, 2), (3, 100, 3), (4, 150, 2)):
        Machine(monkeypatch, host=70_000 * room)
        assert fit_memory(extend(make(num_hidden_layers=layers)), 70_000, NAMED).means["offload"] == every
    Machine(monkeypatch, host=1000)
    with pytest.raises(MemoryError, match=r"into the host's memory, of which 0\.0 GiB may"):
        fit_memory(extend(make()), 70_000, NAMED)


def test_a_step_that_does_not_fit_says_which_one_does(monkeypatch):
    Machine(monkeypatch)
    with pytest.raises(MemoryError, match=r"A step of 200000 tokens needs 20\.\d GiB .* 899\d\d tokens fit"):
        fit_memory(extend(make()), 200_000, NAMED)


def test_the_table_holds_the_numbers():
    text = str(fill(plan(budget=2 * GIB)))
    assert "2.00 GiB" in text and "more for 8 blocks that keep everything" in text


class DistributedDataParallel(torch.nn.Module):
    """By name as torch's, which needs other processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_a_model_that_needs_other_ranks_is_refused(monkeypatch):
    model = extend(make())
    fit.check_alone(model)
    with pytest.raises(ValueError, match=r"wrapped by DDP or FSDP\. Call fit_memory before"):
        fit.check_alone(DistributedDataParallel(model))
    settings = settings_of(next(iter(find_attention_modules(model).values())))
    monkeypatch.setattr(settings, "sharing", object())
    with pytest.raises(ValueError, match="Call fit_memory before parallelize_sequence"):
        fit.check_alone(model)


def test_it_measures_on_a_gpu_only():
    with pytest.raises(ValueError, match="The model is on 'cpu'"):
        fit_memory(extend(make()), 4096)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_the_own_loss_is_measured_as_the_trainer_computes_it(dtype, tied):
    """Under autocast where the output layer is kept in float32 under a half-precision base, and where the caller is."""
    model, seen = extend(make(dtype=dtype, tie_word_embeddings=tied)), []
    core, ids = model.get_base_model(), torch.arange(3, 40)[None]
    core.model.norm.register_forward_hook(
        lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
    )
    expected = model(input_ids=ids, labels=ids).loss.item()
    assert fit.own_loss(model, ids).item() == pytest.approx(expected, rel=1e-2)
    with torch.autocast("cpu", torch.float16):
        fit.own_loss(model, ids)
    is_kept = tied and dtype == torch.bfloat16
    assert [on for on, _ in seen] == [False, is_kept, True]
    assert seen[2][1] == torch.float16
    if is_kept:
        assert seen[1][1] == torch.bfloat16


@pytest.mark.parametrize(("length", "measured"), [(4096, 4096), (32768, 16384), (10**6, 32768)])
def test_the_row_is_doubled_until_its_blocks_decide_the_peak(monkeypatch, length, measured):
    """Something takes 3 GB whatever the row; the blocks take 400 kB a token, more from 5 k on."""
    seen = []

    def peaks(model, tokens, loss):
        seen.append(tokens)
        return Peaks(int(1e9 + 80_000 * tokens), int(max(3e9 + 100 * tokens, 1e9 + 400_000 * tokens)), 0)

    monkeypatch.setattr(fit, "measure_peaks", peaks)
    tokens, found, slope, at_loss = fit._growth(extend(make()), length, None)
    assert tokens == max(seen) == measured and found == peaks(None, tokens, None)
    assert (slope, at_loss) == (100 if length == 4096 else 400_000, 80_000)


@pytest.mark.gpu
def test_the_schedule_of_dense_forwards_is_left_where_it_was():
    model = extend(make(), dense_every=3).cuda()
    settings = settings_of(next(iter(find_attention_modules(model).values())))
    settings.training_forwards = 2
    fit_memory(model, 8192)
    assert settings.training_forwards == 2


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [3 * GIB, 6 * GIB])
def test_the_expected_peak_is_the_measured_one(budget):
    sizes = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8, vocab_size=4096)
    model = extend(make(dtype=torch.bfloat16, **sizes, num_key_value_heads=8), context_length=16384).cuda()
    found = fit_memory(model, 16384, budget)
    assert found.budget < budget
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(4096, (1, 16384), device="cuda")
    model.train()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated()
    assert abs(found.peak - measured) < 0.1 * measured and measured < budget
    assert found.fits

"""What a memory plan chooses, against every other choice; and on a GPU, what it expects against what is measured."""

import pytest
import torch

from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of
from peft_longlora.memory import MemoryPlan, fit, fit_memory
from peft_longlora.memory.fit import choose
from tests.helpers.tiny import extend, make

GIB = 2**30


def plan(length=1000, budget=GIB, fixed=GIB // 4, a_token=100_000, a_loss=60_000, a_block=40_000, blocks=32):
    return MemoryPlan(length, budget, fixed, a_token, a_loss, a_block, blocks)


@pytest.mark.parametrize("budget", [GIB // 2, GIB, 2 * GIB, 4 * GIB])
@pytest.mark.parametrize("a_loss", [10_000, 150_000])
def test_as_many_free_blocks_as_fit(budget, a_loss):
    given = plan(budget=budget, a_loss=a_loss)
    peaks = [given.fixed + 1000 * max(100_000, a_loss + free * 40_000) for free in range(33)]
    chosen = choose(given)
    assert chosen.free == max(free for free, peak in enumerate(peaks) if peak <= budget)
    assert chosen.peak == peaks[chosen.free] <= budget


class Machine:
    """A GPU on which a step's peak is known: 100 MB and so many bytes a token with each of the means."""

    A_TOKEN = (400_000, 300_000, 200_000, 120_000, 110_000)

    def __init__(self, monkeypatch, host=10**12):
        self.now = {}
        monkeypatch.setattr(fit, "checkpoint_blocks", lambda model, **options: setattr(self, "now", options))
        monkeypatch.setattr(fit, "_peak", self.peak)
        monkeypatch.setattr(fit.os, "sysconf", lambda name: host if name == "SC_PHYS_PAGES" else 1)
        monkeypatch.setattr(fit.torch.cuda, "mem_get_info", lambda device: (10**11, 10**11))
        monkeypatch.setattr(fit, "_check", lambda *_: None)

    def peak(self, model, tokens, loss):
        options = {"keep": True, **self.now}
        free = options.pop("free", 0)
        return int(1e8 + tokens * (self.A_TOKEN[fit.MEANS.index(options)] + 50_000 * free))


@pytest.mark.parametrize(
    ("length", "chosen", "free"),
    [(20_000, 0, 1), (15_000, 0, 2), (30_000, 1, 0), (40_000, 2, 0), (70_000, 3, 0), (85_000, 4, 0)],
)
def test_the_fastest_means_that_fit_are_taken(monkeypatch, length, chosen, free):
    machine = Machine(monkeypatch)
    plan = fit_memory(extend(make()), length, 10**10)
    assert (plan.means, plan.free) == (fit.MEANS[chosen], free) and plan.fits
    assert machine.now == {**fit.MEANS[chosen], "free": free}
    trained = sum(p.numel() for p in extend(make()).parameters() if p.requires_grad)
    assert plan.peak == pytest.approx(1e8 + 8 * trained + length * (Machine.A_TOKEN[chosen] + 50_000 * free), rel=1e-3)


def test_the_host_has_an_end_too(monkeypatch):
    """Two blocks of 64 bytes a token: every second one's input waits if both are too much."""
    Machine(monkeypatch, host=70_000 * 100)
    assert fit_memory(extend(make()), 70_000, 10**10).means["offload"] == 2
    Machine(monkeypatch, host=1000)
    with pytest.raises(MemoryError, match=r"into the host's memory, of which 0\.0 GiB may"):
        fit_memory(extend(make()), 70_000, 10**10)


def test_a_step_that_does_not_fit_says_which_one_does(monkeypatch):
    Machine(monkeypatch)
    with pytest.raises(MemoryError, match=r"A step of 200000 tokens needs 20\.\d GiB .* 899\d\d tokens fit"):
        fit_memory(extend(make()), 200_000, 10**10)


def test_the_table_holds_the_numbers():
    text = str(choose(plan(budget=2 * GIB)))
    assert "2.00 GiB" in text and "32 of 32 blocks not checkpointed" in text


def test_it_measures_on_a_gpu_only():
    with pytest.raises(ValueError, match="The model is on 'cpu'"):
        fit_memory(extend(make()), 4096)


@pytest.mark.parametrize(("length", "measured"), [(4096, 4096), (32768, 16384), (10**6, 32768)])
def test_the_row_is_doubled_until_its_blocks_decide_the_peak(monkeypatch, length, measured):
    """The embeddings' gradient takes 3 GB whatever the row; the blocks take 400 kB a token, more from 5 k on."""
    seen = []

    def peak(model, tokens, loss):
        seen.append(tokens)
        return int(max(3e9 + 100 * tokens, 1e9 + 400_000 * tokens))

    monkeypatch.setattr(fit, "_peak", peak)
    tokens, found, slope = fit._growth(extend(make()), length, None)
    assert tokens == max(seen) == measured and found == peak(None, tokens, None)
    assert slope == (100 if length == 4096 else 400_000)


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
    assert found.fits and (found.free > 0) == (budget > 4 * GIB)

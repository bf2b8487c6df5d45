"""What a memory plan chooses, against every other choice; and on a GPU, what it expects against what is measured."""

import pytest
import torch
from torch import nn

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


def test_a_step_that_does_not_fit_says_which_one_does():
    with pytest.raises(MemoryError, match=r"A step of 10000 tokens needs 1\.2 GiB .* 8053 tokens fit"):
        choose(plan(length=10_000))
    assert choose(plan(length=8053)).free == 1


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
    assert isinstance(model, nn.Module) and found.free > 0

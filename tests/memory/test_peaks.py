"""The peak that `fit_memory` expects of a row, against the bytes that a real step holds on a CPU."""

import math

import pytest
import torch

from peft_longlora.memory import fit, fit_memory, plan
from peft_longlora.memory.plan import NAMED_FILLED
from tests.helpers.held_bytes import as_gpu, loss
from tests.helpers.tiny import extend, make

TILE = dict(tile_tokens=256)


def on_gpu(monkeypatch, held, length, shortest, **sizes):
    """A model with tiles of 256 tokens, of which everything is counted."""
    as_gpu(held, monkeypatch, shortest)
    monkeypatch.setattr(plan, "MEANS", (TILE,))
    base = make(**sizes, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, vocab_size=64)
    model = extend(base, context_length=length // 64 * 64, group_size=64, r=1).train()
    for parameter in model.parameters():
        held.add(parameter)
    return model


def most(held, model, length):
    """Bytes at the peak of a step, with AdamW's moments."""
    held.forget()
    loss(model, torch.randint(64, (1, length))).backward()
    model.zero_grad()
    return held.most + 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("length", [1024, 16384])
def test_a_tile_hides_nothing_of_attention(monkeypatch, held, length):
    """In a short row the peak is in a tile, whose inner tensors are the same in any row; in a long one in attention."""
    model = on_gpu(monkeypatch, held, length, 64, num_hidden_layers=4, head_dim=32, intermediate_size=1024)
    found = fit_memory(model, length, 10**12, loss=loss, liger=False)
    least = math.ceil((found.fixed + found.in_block + 1) / NAMED_FILLED)
    tight = fit_memory(model, length, least, loss=loss, liger=False)
    assert (tight.free, tight.keep) == (0, 0)
    assert tight.peak == pytest.approx(most(held, model, length), rel=0.001)
    assert (tight.in_block > length * tight.token_bytes) == (length == 1024)


@pytest.mark.parametrize(("length", "blocks"), [(257, 4), (2048, 4), (1024, 1)])
def test_few_blocks_and_rows_barely_longer_than_a_tile(monkeypatch, held, length, blocks):
    """With any numbers of blocks that keep everything and attention. One block's attention may be counted too much."""
    sizes = dict(num_hidden_layers=blocks, head_dim=8, intermediate_size=128, dtype=torch.bfloat16)
    model = on_gpu(monkeypatch, held, length, 128, **sizes)
    every = fit_memory(model, length, 10**12, loss=loss, liger=False)
    least, seen = every.fixed + every.in_block, set()
    for share in (1, 0.4, 0.3, 0.1, 0.04):
        budget = math.ceil((least + share * (every.peak - least) + 10) / NAMED_FILLED)
        found = fit_memory(model, length, budget, loss=loss, liger=False)
        seen.add((found.free, found.keep))
        assert 0.99 < found.peak / most(held, model, length) < 1.06, found
    assert len(seen) > blocks // 2 + 1


@pytest.mark.parametrize("length", [257, 300, 511, 1025])
def test_no_step_is_longer_than_the_one_that_is_planned(monkeypatch, held, length):
    """A GPU may have no room for it."""
    model = on_gpu(monkeypatch, held, length, 64, num_hidden_layers=2, head_dim=8, intermediate_size=64)
    seen, measure = [], fit.measure_peaks
    monkeypatch.setattr(fit, "measure_peaks", lambda *given: seen.append(given[1]) or measure(*given))
    fit_memory(model, length, 10**12, loss=loss, liger=False)
    assert length - 1 <= max(seen) <= length + 1 or max(seen) == 1024 < length

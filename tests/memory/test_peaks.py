"""The peak that `fit_memory` expects of a long row, against the bytes that a real step holds on a CPU."""

import gc
import math

import pytest
import torch

from peft_longlora.memory import fit_memory, plan
from peft_longlora.memory.plan import NAMED_FILLED
from tests.helpers.held_bytes import Held, as_gpu
from tests.helpers.tiny import extend, make

TILE = dict(tile_tokens=256)


def loss(model, ids):
    """As a fused one: no logits of the whole row."""
    return model(input_ids=ids, logits_to_keep=8).logits.float().logsumexp(-1).sum()


@pytest.fixture
def held():
    gc.collect()
    with Held() as held:
        yield held


@pytest.mark.parametrize("length", [1024, 16384])
def test_a_tile_hides_nothing_of_attention(monkeypatch, held, length):
    """In a short row the peak is in a tile, whose inner tensors are the same in any row; in a long one in attention."""
    as_gpu(held, monkeypatch, shortest=64)
    monkeypatch.setattr(plan, "MEANS", (TILE,))
    sizes = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=32, intermediate_size=1024)
    model = extend(make(**sizes, num_hidden_layers=4, vocab_size=64), context_length=length, group_size=64, r=1).train()
    for parameter in model.parameters():
        held.add(parameter)
    found = fit_memory(model, length, 10**12, loss=loss, liger=False)
    least = math.ceil((found.fixed + found.in_block + 1) / NAMED_FILLED)
    tight = fit_memory(model, length, least, loss=loss, liger=False)
    assert (tight.free, tight.keep) == (0, 0)
    held.forget()
    loss(model, torch.randint(64, (1, length))).backward()
    moments = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert tight.peak == pytest.approx(held.most + moments, rel=0.001)
    assert (tight.in_block > length * tight.token_bytes) == (length == 1024)

"""Whole steps with all means together: many of them, and what they allocate."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_longlora.memory import checkpoint_blocks
from tests.helpers.tiny import IDS, extend, make

ALL = dict(keep=1, keep_in_host=1, offload=2, tile_tokens=20)


def curve(options, steps):
    model = extend(make(dtype=torch.bfloat16, num_hidden_layers=2), group_size=16, lora_dropout=0.1).train()
    if options is not None:
        checkpoint_blocks(model, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    torch.manual_seed(5)
    losses, ids = [], IDS[:1, :48]
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("steps", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_the_losses_of_many_steps_lie_on_each_other(steps, monkeypatch):
    monkeypatch.setattr("peft_longlora.memory.places.LEAST_BYTES", 1)
    plain, together = curve(None, steps), curve(ALL, steps)
    assert plain[-1] < 0.9 * plain[0]
    assert max(abs(a - b) / a for a, b in zip(plain, together, strict=True)) < 2e-2


class _Rows(TorchDispatchMode):
    """Operators that make a float32 tensor as long as the row and as wide as the model."""

    def __init__(self, numbers: int):
        super().__init__()
        self.numbers, self.found = numbers, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.numel() >= self.numbers:
                self.found.add(str(function))
        return out


def test_no_step_makes_a_float32_row(monkeypatch):
    """With norms that keep the dtype, as Liger's do; the logits of this vocabulary are smaller than the row."""
    monkeypatch.setattr("peft_longlora.adapter.precision.ROWS", 512)
    sizes = dict(vocab_size=97, hidden_size=128, num_attention_heads=8)
    ids = torch.randint(97, (1, 4096), generator=torch.Generator().manual_seed(0))
    found = {}
    for family, options in (("starcoder2", None), ("starcoder2", ALL | dict(tile_tokens=1500)), ("llama", None)):
        model = extend(make(family, dtype=torch.bfloat16, **sizes), group_size=256, context_length=2048).train()
        if options:
            checkpoint_blocks(model, **options)
        with _Rows(4096 * 128) as rows:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found[family, bool(options)] = rows.found
    assert found["starcoder2", False] == found["starcoder2", True] == set()
    assert found["llama", False]  # its norms in PyTorch compute in float32

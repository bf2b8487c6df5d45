"""Checkpointed and free blocks: the same step, and attention computed once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_longlora.memory import checkpoint_blocks
from peft_longlora.memory.blocks import find_blocks
from peft_longlora.memory.keep import is_attention
from tests.helpers.tiny import IDS, extend, make


class _Count(TorchDispatchMode):
    """Counts forwards of attention, and matrix products."""

    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.attention += is_attention(function)
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def step(model):
    model.train()
    model.zero_grad()
    with _Count() as counted:
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("free", "keep"), [(0, False), (0, True), (1, True), (2, True), (1, False)])
def test_loss_and_gradients_are_those_of_the_plain_step(dtype, free, keep):
    model = extend(make(dtype=dtype), group_size=16)
    loss, grads, _ = step(model)
    checkpoint_blocks(model, free=free, keep=keep)
    again, found, _ = step(model)
    assert torch.equal(loss, again) and grads.keys() == found.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_what_is_computed_a_second_time():
    model = extend(make(), group_size=16)
    *_, plain = step(model)
    counts = {}
    for free, keep in [(0, False), (0, True), (1, True), (2, True)]:
        checkpoint_blocks(model, free=free, keep=keep)
        *_, counts[free, keep] = step(model)
    assert plain.attention > 0
    assert counts[0, False].attention == 2 * plain.attention  # computed again
    assert counts[0, True].attention == counts[1, True].attention == plain.attention
    assert counts[0, True].products > counts[1, True].products > counts[2, True].products == plain.products


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt_neox", "mixtral"])
def test_blocks_are_found_in_order(model_type):
    model = make(model_type)
    blocks = find_blocks(extend(model) if model_type == "llama" else model)
    assert len(blocks) == model.config.num_hidden_layers
    assert [next(m.layer_idx for m in b.modules() if hasattr(m, "layer_idx")) for b in blocks] == [0, 1]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="free=3 is outside 0 to 2"):
        checkpoint_blocks(make(), free=3)
    with pytest.raises(ValueError, match="no blocks that transformers can checkpoint"):
        checkpoint_blocks(torch.nn.Linear(2, 2))

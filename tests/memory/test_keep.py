"""Attention that is kept beside dropout: the second forward drops what the first dropped."""

import pytest
import torch
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

from peft_longlora.memory import checkpoint_blocks, keep, keep_attention, places
from peft_longlora.memory.places import HostMemory
from tests.helpers.tiny import IDS, extend, make


@torch.library.custom_op("memory_tests::attend", mutates_args=())
def attend(query: torch.Tensor, dropout_p: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of PyTorch's fused attention, which drops weights only on a GPU."""
    mask = torch.bernoulli(torch.full_like(query, 1 - dropout_p)) if dropout_p else torch.ones_like(query)
    return query * mask, mask


attend.register_autograd(
    lambda ctx, grad, _: (grad * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("context_fn", [keep_attention, lambda: keep.keep_in_host(HostMemory(), 0)])
def test_dropout_behind_attention_is_that_of_the_first_forward(monkeypatch, rate, by_name, context_fn):
    operator = torch.ops.memory_tests.attend.default
    monkeypatch.setattr(keep, "ATTENTION", keep.ATTENTION | {operator})
    calls = []

    def block(x):
        calls.append(x)
        out, _ = operator(x, dropout_p=rate) if by_name else operator(x, rate)
        return dropout(out * x, 0.5).sin()

    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False, context_fn=context_fn)):
        x = torch.arange(1.0, 200.0, requires_grad=True)
        torch.manual_seed(0)
        run(x).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found) and len(calls) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("options", [dict(keep=1), dict(keep=1, keep_in_host=2, offload=2)])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
def test_a_model_with_dropout_trains_as_without_checkpoints(monkeypatch, options, attention_dropout):
    monkeypatch.setattr(places, "LEAST_BYTES", 1)
    base = make(num_hidden_layers=4, attention_dropout=attention_dropout, dtype=torch.bfloat16)
    model = extend(base, group_size=16, lora_dropout=0.3).cuda().train()
    ids = IDS.cuda()

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    checkpoint_blocks(model, **options)
    again = gradients()
    assert plain.keys() == again.keys()
    for name, grad in plain.items():  # another mask moves a gradient by about its own length
        assert (again[name] - grad).norm() <= 0.05 * grad.norm(), name

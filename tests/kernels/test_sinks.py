"""Attention sinks and sliding windows: every backend that runs here against the reference, forward and backward."""

import pytest
import torch

from peft_longlora import s2_attention
from peft_longlora.kernels.operators import KERNELS, Launched
from peft_longlora.reference import s2_attention_reference
from tests.helpers import plain_kernel

S = 300
# Padding before documents of 35, 1 and 259 tokens; and one of 290 before padding.
SEGMENTS = torch.tensor([[0] * 5 + [1] * 35 + [2] + [3] * 259, [1] * 290 + [0] * 10])
CASES = [("s2", 16, None), ("local", 16, None), ("full", 16, None), ("full", 16, 7), ("full", 16, 1), ("full", 16, 64)]
CASES += [("window", 256, None), ("adaptive", 256, None)]
SHAPES = [(4, 2, 16, 16), (6, 1, 8, 8), (4, 4, 16, 8)]  # H, H_kv, D, D_v


def tensors(heads, kv_heads, dim, value_dim):
    generator = torch.Generator().manual_seed(heads)
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim)
    made = [torch.randn(2, S, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64)
    return [*(x.transpose(1, 2).requires_grad_() for x in made[:3]), sinks.requires_grad_()], made[3]


def found_by(function, inputs, dout, *args, with_sinks=True, **more):
    q, k, v, sinks = inputs
    out = function(q, k, v, *args, segment_ids=SEGMENTS, sinks=sinks if with_sinks else None, **more)
    if not torch.is_grad_enabled():
        return [out]
    return [out, *torch.autograd.grad((out * dout).sum(), inputs if with_sinks else inputs[:3])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_sdpa(case, shape):
    pattern, size, window = case
    inputs, dout = tensors(*shape)
    for with_sinks in (True, False):
        how = dict(pattern=pattern, window=window, with_sinks=with_sinks)
        found = found_by(s2_attention, inputs, dout, size, backend="sdpa", **how)
        torch.testing.assert_close(found, found_by(s2_attention_reference, inputs, dout, size, **how))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_flex_forward(case):
    pattern, size, window = case
    inputs, dout = tensors(*SHAPES[0])
    inputs, how = [x.float().detach() for x in inputs], dict(pattern=pattern, window=window)
    found = found_by(s2_attention, inputs, dout, size, backend="flex", **how)
    wanted = found_by(s2_attention_reference, inputs, dout, size, **how)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("pattern", ["s2", "local", "full"])
def test_a_kernel_without_sinks_gets_them_from_its_sums(pattern, shape, monkeypatch):
    """The way of all flash kernels: PyTorch's for CPUs has no sinks, and its sums are float32."""
    monkeypatch.setitem(plain_kernel.backends.BACKENDS, "cpu", Launched(KERNELS["cpu"]))
    inputs, dout = tensors(*shape)
    found = found_by(s2_attention, inputs, dout, 16, pattern=pattern, backend="cpu")
    wanted = found_by(s2_attention_reference, inputs, dout, 16, pattern=pattern)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    inputs[3].requires_grad_(False)  # a frozen sink costs no gradient
    out = s2_attention(*inputs[:3], 16, segment_ids=SEGMENTS, pattern=pattern, sinks=inputs[3], backend="cpu")
    torch.testing.assert_close(torch.autograd.grad((out * dout).sum(), inputs[0])[0], wanted[1], rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_share_of_a_sink():
    """All weights of a value of 1 sum to what the sink leaves; dropout keeps the mean of it."""
    q = torch.randn(1, 2, 400, 8, generator=torch.Generator().manual_seed(0))
    ones, sinks = torch.ones_like(q), torch.tensor([0.5, 2.0])
    torch.manual_seed(0)
    kept = s2_attention(q, q, ones, 200, sinks=sinks, backend="sdpa").mean((0, 1, 3))
    dropped = s2_attention(q, q, ones, 200, sinks=sinks, dropout=0.3, backend="sdpa").mean((0, 1, 3))
    torch.testing.assert_close(dropped, kept, rtol=0.05, atol=0.05)
    assert (kept < 0.99).all()


def test_what_does_not_fit_is_refused():
    q = torch.randn(1, 4, 20, 8)
    with pytest.raises(ValueError, match=r"sinks has shape \(2,\): it must be \(H,\), \(4,\)"):
        s2_attention(q, q, q, 8, sinks=torch.zeros(2))
    with pytest.raises(ValueError, match="window=4, pattern='s2'"):
        s2_attention(q, q, q, 8, window=4)
    with pytest.raises(ValueError, match="window=0, pattern='full'"):
        s2_attention(q, q, q, 8, pattern="full", window=0)

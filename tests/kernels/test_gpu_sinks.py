"""Sinks and sliding windows on every backend of this GPU, against the reference: `pytest -m gpu`.

The same on a CPU: test_sinks.py.
"""

import pytest
import torch

from peft_longlora import s2_attention
from peft_longlora.kernels import backends
from peft_longlora.reference import s2_attention_reference
from tests.kernels.test_gpu import BACKENDS, error, inputs, segments

pytestmark = pytest.mark.gpu

ROWS = {
    "one document": None,
    "packed": [[1000, 13, 1, 300, 686]],
    "packed and padded": [[-100, 700, 400, -50], [1200, -50]],
}
CASES = {"s2": ("s2", 256, None), "dense": ("full", 256, None), "a window": ("full", 256, 200)}


@pytest.fixture(autouse=True)
def compile_anew():
    """FlexAttention is compiled for each kind of call, and dynamo allows eight kinds a process."""
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(8, 2, 64), (8, 2, 128)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_and_windows(backend, shape, case, rows):
    heads, kv_heads, dim = shape
    pattern, size, window = CASES[case]
    if window and backends.windowed(backend) is None:
        pytest.skip("this kernel has no window, and layers with one take another")
    ids = segments(ROWS[rows])
    batch, length = (1, 2000) if ids is None else ids.shape
    q, k, v = inputs(batch, heads, kv_heads, length, dim)
    sinks = torch.randn(heads, device="cuda", requires_grad=True)
    dout = torch.randn(batch, length, heads, dim, device="cuda")
    how = dict(segment_ids=ids, pattern=pattern, window=window)
    plain = [x.detach().float().requires_grad_() for x in (q, k, v, sinks)]
    want = s2_attention_reference(*plain[:3], size, sinks=plain[3], **how)
    got = s2_attention(q, k, v, size, sinks=sinks, backend=backend, **how)
    wanted = [want, *torch.autograd.grad(want, plain, dout)]
    found = [got, *torch.autograd.grad(got, (q, k, v, sinks), dout.to(got.dtype))]
    errors = {n: error(a, b) for n, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), found, wanted, strict=True)}
    print(backend, shape, case, rows, {name: f"{x:.1e}" for name, x in errors.items()})
    assert max(errors.values()) < 0.015, errors


@pytest.mark.parametrize("pattern", ["window", "adaptive"])
def test_sinks_in_blocks_of_keys(pattern):
    """flex against sdpa: blocks are chosen by content, so both must get the same numbers."""
    tensors = [*inputs(1, 4, 2, 4096), torch.randn(4, device="cuda", requires_grad=True)]
    dout = torch.randn(1, 4096, 4, 64, device="cuda", dtype=torch.bfloat16)
    found = []
    for backend in ("flex", "sdpa"):
        out = s2_attention(*tensors[:3], 1024, pattern=pattern, sinks=tensors[3], backend=backend)
        found.append([out, *torch.autograd.grad(out, tensors, dout)])
    errors = [error(a, b) for a, b in zip(*found, strict=True)]
    print(pattern, [f"{x:.1e}" for x in errors])
    assert max(errors) < 0.015, errors

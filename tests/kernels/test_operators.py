"""The launches of the two halves, with a plain kernel in place of a GPU's: every token, head and gradient once."""

import pytest
import torch

from peft_longlora import s2_attention
from peft_longlora.kernels import operators
from peft_longlora.kernels.cuts import Boundaries, tensors_of
from peft_longlora.kernels.groups import plan_from_segment_ids, plan_groups
from peft_longlora.kernels.launches import LEAST_BATCHED_WORK, find_batches, plan_launches
from peft_longlora.reference import s2_attention_reference
from tests.helpers.plain_kernel import PlainKernel, install


@pytest.fixture(params=["batches", "pieces", "both"])
def kernel(request, monkeypatch):
    kernel = PlainKernel(request.param != "pieces", request.param != "batches")
    install(monkeypatch, kernel)
    return kernel


def attend(q, k, v, groups):
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out, _ = operators.attend_halves(*flat, *tensors_of(groups, q.device), q.shape[-1] ** -0.5, 0.0, "plain")
    return out.view(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


def inputs(batch, heads, kv_heads, length, dim=8, value_dim=8):
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim)
    # in the layout of a projection: (B, S, H, D) in memory
    return [torch.randn(batch, length, h, d, dtype=torch.float64).transpose(1, 2).requires_grad_() for h, d in shapes]


CASES = {
    "regular": (1, 4, 2, 64, 16, None),
    "one document short": (1, 4, 2, 10, 16, None),
    "ragged": (1, 4, 4, 61, 16, None),
    "heads 9/3": (1, 9, 3, 64, 16, None),
    "one KV head": (1, 4, 1, 64, 16, None),
    "one head": (1, 1, 1, 64, 16, None),
    "batch": (3, 4, 2, 48, 16, None),
    "packed": (2, 4, 2, 60, 16, [[20, 40], [5, 33, 22]]),
    "padded": (2, 4, 2, 60, 16, [[-13, 47], [50, -10]]),
    "packed and padded": (2, 6, 2, 60, 16, [[-3, 20, 30, -7], [17, 43]]),
    "a row of padding": (2, 4, 2, 40, 16, [[-40], [40]]),
}


def segments(rows):
    """Lengths of documents, negative for padding, as (B, S) segment ids."""
    if rows is None:
        return None
    return torch.stack([torch.cat([torch.full((abs(n),), i * (n > 0)) for i, n in enumerate(row, 1)]) for row in rows])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_halves_agree_with_the_reference(case, kernel):
    batch, heads, kv_heads, length, size, rows = CASES[case]
    q, k, v = inputs(batch, heads, kv_heads, length, value_dim=12)
    ids = segments(rows)
    groups = plan_groups(batch, length, size) if ids is None else plan_from_segment_ids(ids, size)
    dout = torch.randn(batch, length, heads, 12, dtype=torch.float64)
    got, want = attend(q, k, v, groups), s2_attention_reference(q, k, v, size, segment_ids=ids)
    torch.testing.assert_close(got, want)
    for name, a, b in zip(
        "qkv", torch.autograd.grad(got, (q, k, v), dout), torch.autograd.grad(want, (q, k, v), dout), strict=True
    ):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_padding_is_zero_even_where_inputs_and_gradients_are_nan(kernel):
    q, k, v = inputs(1, 4, 2, 40)
    ids = segments([[-8, 32]])
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, :8] = float("nan")
    out = attend(q, k, v, plan_from_segment_ids(ids, 16))
    dout = torch.randn_like(out)
    dout[:, :8] = float("nan")
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert (out[:, :8] == 0).all() and not out.isnan().any()
    assert all((g[:, :, :8] == 0).all() and not g.isnan().any() for g in grads)


def test_only_some_inputs_want_a_gradient(kernel):
    q, k, v = inputs(1, 4, 2, 32)
    k = k.detach()
    groups = plan_groups(1, 32, 8)
    attend(q, k, v, groups).square().sum().backward()
    assert q.grad is not None and v.grad is not None and k.grad is None


def test_operators_are_well_formed(kernel):
    q, k, v = (x.transpose(1, 2).flatten(0, 1).detach().requires_grad_() for x in inputs(1, 4, 2, 32))
    groups = plan_groups(1, 32, 8)
    args = (q, k, v, *tensors_of(groups, q.device), 0.3, 0.0, "plain")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operators.attend_halves, args, test_utils=tests)


def test_compiles_once_for_all_lengths(kernel):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for length in (40, 56, 64, 100):
        q, k, v = inputs(1, 4, 2, length, dim=24, value_dim=24)  # 24: no other size equals it by chance
        groups = plan_groups(1, length, 16)
        tensors_of(groups, q.device)  # `mask` and `s2_attention` make it outside compiled code
        want = s2_attention_reference(q, k, v, 16)
        got = compiled(q, k, v, groups)
        torch.testing.assert_close(got, want)
        (grad,) = torch.autograd.grad(got.square().sum(), q)
        torch.testing.assert_close(grad, torch.autograd.grad(want.square().sum(), q)[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("with_segments", [False, True])
def test_s2_attention_compiles_once_for_all_lengths(kernel, with_segments):
    from torch._dynamo.testing import CompileCounterWithBackend

    if not kernel.takes_pieces:
        pytest.skip("a compiled call knows no lengths, so it is for kernels that take cumulative lengths")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(s2_attention, backend=counter, fullgraph=True)
    for length in (40, 56, 64, 100):
        q, k, v = inputs(1, 4, 2, length, dim=24, value_dim=24)
        ids = segments([[-3, 20, length - 23]]) if with_segments else None
        for x, dim in ((q, 2), (k, 2), (v, 2), *(((ids, 1),) if with_segments else ())):
            torch._dynamo.mark_dynamic(x, dim)
        want = s2_attention_reference(q, k, v, 16, segment_ids=ids)
        got = compiled(q, k, v, 16, segment_ids=ids, backend="plain")
        torch.testing.assert_close(got, want)
        (grad,) = torch.autograd.grad(got.square().sum(), q)
        torch.testing.assert_close(grad, torch.autograd.grad(want.square().sum(), q)[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(kernel, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    q, k, v = inputs(1, 4, 2, 40)
    groups = plan_groups(1, 40, 16)
    plain = torch.autograd.grad(attend(q, k, v, groups).square().sum(), (q, k, v))
    out = checkpoint(attend, q, k, v, groups, use_reentrant=use_reentrant)
    out.square().sum().backward()
    for x, want in zip((q, k, v), plain, strict=True):
        torch.testing.assert_close(x.grad, want)


def test_a_graph_can_be_walked_twice(kernel):
    q, k, v = inputs(1, 4, 2, 40)
    out = attend(q, k, v, plan_groups(1, 40, 16))
    first = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), (q, k, v))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("boundaries", "expected"),
    [
        ((0, 4, 8, 12), [(0, 4, 3, 4)]),
        ((0, 2, 6, 10, 12), [(2, 4, 2, 4), (0, 2, 2, 10)]),
        ((0, 2, 6, 9), [(2, 4, 1, 4), (6, 3, 1, 3), (0, 2, 1, 2)]),
        ((0, 2, 6, 8, 10, 14, 16), [(2, 4, 2, 8), (0, 2, 2, 6), (8, 2, 2, 6)]),
        ((0,), []),
    ],
)
def test_find_batches(boundaries, expected):
    assert find_batches(boundaries) == expected


def test_large_regular_work_is_batched_and_small_or_irregular_work_is_not():
    def kinds(groups, heads=32):
        bounds = Boundaries.read(tensors_of(groups, torch.device("cpu"))[0])
        return [x.count for x in plan_launches(bounds, heads, 8, 128, True, True)]

    assert kinds(plan_groups(1, 32768, 8192)) == [4, 3, 2]
    assert LEAST_BATCHED_WORK > 2 * 512 * 2048 * 128 * 32
    assert kinds(plan_groups(1, 2048, 512)) == [4, 0]
    ids = segments([[5000, 3000, 9000, 2500, 4100, 9168]])
    assert kinds(plan_from_segment_ids(ids, 2048)) == [0, 0]


def test_layout_survives_its_tensors():
    ids = segments([[-3, 20, 30, -7], [17, 43]])
    groups = plan_from_segment_ids(ids, 16)
    layout, cu_seqlens = tensors_of(groups, torch.device("cpu"))
    bounds = Boundaries.read(layout)
    assert (bounds.straight, bounds.shifted) == (groups.straight, groups.shifted)
    assert bounds.padding == ((0, 3), (53, 60))
    assert tuple(cu_seqlens[bounds.span("shifted")].tolist()) == groups.shifted

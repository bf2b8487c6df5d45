"""Every backend that this GPU and its packages offer, against the reference: `pytest -m gpu tests/kernels`.

The same cases on a CPU, with plain kernels in place of these: test_operators.py and test_attend.py.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from peft_longlora import s2_attention
from peft_longlora.kernels import backends
from peft_longlora.kernels.attend import attend
from peft_longlora.kernels.cuts import Cuts, tensors_of
from peft_longlora.kernels.groups import plan_groups
from peft_longlora.kernels.kernel import Needs, Options
from peft_longlora.kernels.operators import attend_halves, attend_halves_backward
from peft_longlora.kernels.patterns import BLOCK_PATTERNS
from peft_longlora.reference import s2_attention_reference
from peft_longlora.sequence.halo import attend_far, attend_far_backward, merge

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compile_anew():
    """FlexAttention is compiled for each kind of call, and dynamo allows eight kinds a process."""
    torch._dynamo.reset()


# Relative errors of output and gradients: rounding of the inputs' type, a few times.
MOST = {torch.bfloat16: 0.01, torch.float16: 0.002, torch.float32: 1e-4}


def available() -> list[str]:
    """Backends that are installed; at least PyTorch's own, so that nothing passes by being absent."""
    if not torch.cuda.is_available():
        return ["varlen", "cudnn", "sdpa", "flex"]
    device = torch.device("cuda")
    found = [name for name in backends.BACKENDS if backends.BACKENDS[name].missing(device) is None]
    assert {"varlen", "cudnn", "sdpa", "flex"} <= set(found)
    return found


BACKENDS = available()


def inputs(batch, heads, kv_heads, length, dim=64, value_dim=None, dtype=torch.bfloat16):
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)
    make = [torch.randn(batch, length, h, d, device="cuda", dtype=dtype) for h, d in shapes]
    return [x.transpose(1, 2).detach().requires_grad_() for x in make]


def segments(rows):
    """Lengths of documents, negative for padding, as (B, S) segment ids."""
    if rows is None:
        return None
    rows = [torch.cat([torch.full((abs(n),), i * (n > 0)) for i, n in enumerate(row, 1)]) for row in rows]
    return torch.stack(rows).cuda()


def error(got, want):
    """Relative to the norm of `want`, or to ones where that is less (the gradient through one key is 0)."""
    least = want.numel() ** 0.5
    return ((got.float() - want.float()).norm() / want.float().norm().clamp(min=0.1 * least)).item()


def compare(call, qkv, size, ids=None, pattern="s2", dout=None, scaling=None):
    """Output and gradients of `call(q, k, v)` against the reference on the same numbers in float32."""
    plain = [x.detach().float().requires_grad_() for x in qkv]
    want = s2_attention_reference(*plain, size, segment_ids=ids, pattern=pattern, scaling=scaling)
    dout = torch.randn_like(want) if dout is None else dout
    wanted = [want, *torch.autograd.grad(want, plain, dout)]
    got = call(*qkv)
    found = [got, *torch.autograd.grad(got, qkv, dout.to(got.dtype))]
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert a.isfinite().all(), name
        assert error(a, b) < MOST[qkv[0].dtype], (name, error(a, b))
    return found


CASES = {
    "regular": (1, 8, 2, 1024, 256, None),
    "MHA": (1, 4, 4, 1024, 256, None),
    "heads 9/3": (1, 9, 3, 1024, 256, None),
    "one KV head": (1, 4, 1, 512, 128, None),
    "one head": (1, 1, 1, 512, 128, None),
    "ragged": (1, 4, 2, 1000, 150, None),
    "short": (1, 4, 2, 77, 128, None),
    "batch": (3, 4, 2, 512, 128, None),
    "packed": (1, 4, 2, 900, 128, [[100, 30, 400, 1, 369]]),
    "packed batch": (2, 4, 2, 600, 128, [[200, 400], [50, 330, 220]]),
    "padded left and right": (2, 4, 2, 600, 128, [[-130, 470], [500, -100]]),
    "documents of one token": (1, 4, 2, 300, 128, [[1] * 300]),
    "a row of padding": (2, 4, 2, 256, 64, [[-256], [256]]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_reference(backend, case, dtype):
    batch, heads, kv_heads, length, size, rows = CASES[case]
    qkv, ids = inputs(batch, heads, kv_heads, length, dtype=dtype), segments(rows)
    found = compare(lambda *x: s2_attention(*x, size, segment_ids=ids, backend=backend), qkv, size, ids)
    if ids is not None:
        assert (found[0][ids == 0] == 0).all()
        assert all((x.transpose(1, 2)[ids == 0] == 0).all() for x in found[1:])


@pytest.mark.parametrize("pattern", ["local", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_patterns(backend, pattern):
    qkv = inputs(1, 8, 2, 1024, 128)
    compare(lambda *x: s2_attention(*x, 256, pattern=pattern, backend=backend), qkv, 256, pattern=pattern)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling(backend):
    qkv = inputs(1, 8, 2, 512, 128)
    compare(lambda *x: s2_attention(*x, 128, scaling=0.2, backend=backend), qkv, 128, scaling=0.2)


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x not in ("sdpa", "flex")])
def test_a_kernel_as_long_as_its_batches(backend, monkeypatch):
    """Small work goes in one launch a half; here it is cut into batches as large work is."""
    from peft_longlora.kernels import launches

    monkeypatch.setattr(launches, "LEAST_BATCHED_WORK", 0)
    launches.plan_launches.cache_clear()
    for length in (1024, 1000):
        qkv = inputs(1, 8, 2, length, 128)
        compare(lambda *x: s2_attention(*x, 256, backend=backend), qkv, 256, scaling=None)
    launches.plan_launches.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_any_stride_and_an_expanded_gradient(backend):
    q, k, v = inputs(2, 4, 2, 300)
    q = q.detach().contiguous().requires_grad_()  # (B, H, S, D) in memory: tokens of two rows are no strip
    k = torch.randn(2, 2, 64, 300, device="cuda", dtype=torch.bfloat16).transpose(2, 3).detach().requires_grad_()
    v = torch.randn(2, 300, 5, 64, device="cuda", dtype=torch.bfloat16)[:, :, 1:3].transpose(1, 2)
    v = v.detach().requires_grad_()
    dout = torch.ones((), device="cuda").expand(2, 300, 4, 64)
    compare(lambda *x: s2_attention(*x, 128, backend=backend), [q, k, v], 128, dout=dout)


@pytest.mark.parametrize("backend", ["flash_attention_4", "sdpa"])
def test_values_of_another_width(backend):
    if backend not in BACKENDS:
        pytest.skip(f"{backend} is not installed")
    qkv = inputs(1, 4, 4 if backend == "flash_attention_4" else 2, 512, dim=96, value_dim=64)
    compare(lambda *x: s2_attention(*x, 128, backend=backend), qkv, 128)


@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (300, 77), (1, 200), (200, 1), (1, 1), (33, 1000)])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("backend", [x for x in BACKENDS if x not in ("flex", "sdpa")])
def test_keys_of_another_rank(backend, heads, queries, keys):
    """Two parts of one softmax, as `halo` computes and merges them, against dense attention in float32."""
    heads, kv_heads = heads
    q, dout = torch.randn(2, queries, heads, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, keys + queries, kv_heads, 128, device="cuda", dtype=torch.bfloat16)
    plain = [x.float().requires_grad_() for x in (q, k, v)]
    mask = torch.ones(queries, keys + queries, dtype=torch.bool, device="cuda").tril(keys)
    wide = [x.transpose(0, 1)[None] for x in plain]
    want = scaled_dot_product_attention(*wide, mask, scale=0.1, enable_gqa=True)[0].transpose(0, 1)
    grads = torch.autograd.grad(want, plain, dout.float())

    how, plan = (0.1, 0.0, backend), tensors_of(plan_groups(1, queries, 2, "full"), q.device)
    (far_k, near_k), (far_v, near_v) = k.split([keys, queries]), v.split([keys, queries])
    out, lse = attend_halves(q, near_k, near_v, *plan, *how)
    merge(out, lse, *attend_far(q, far_k, far_v, *how))
    dq, *near = attend_halves_backward(dout, q, near_k, near_v, out, lse, *plan, *how)
    far_dq, *far = attend_far_backward(dout, q, far_k, far_v, out, lse, *how)
    found = [out, dq.float() + far_dq.float(), *(torch.cat(pair) for pair in zip(far, near, strict=True))]
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, (want, *grads), strict=True):
        assert a.isfinite().all() and error(a, b) < MOST[torch.bfloat16], (name, error(a, b))


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x != "sdpa"])
def test_padding_is_zero_even_where_inputs_and_gradients_are_nan(backend):
    q, k, v = inputs(1, 4, 2, 512)
    ids = segments([[-200, 312]])
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, :200] = float("nan")
    out = s2_attention(q, k, v, 128, segment_ids=ids, backend=backend)
    dout = torch.randn_like(out)
    dout[:, :200] = float("nan")
    grads = torch.autograd.grad(out, (q, k, v), dout)
    assert (out[:, :200] == 0).all() and out.isfinite().all()
    assert all((g[:, :, :200] == 0).all() and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x not in ("cudnn", "flex")])
def test_deterministic_mode(backend):
    q, k, v = inputs(1, 8, 2, 4096, 128)
    dout = torch.randn(1, 4096, 8, 128, device="cuda", dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(4):
            out = s2_attention(q, k, v, 1024, backend=backend)
            runs.append([out, *torch.autograd.grad(out, (q, k, v), dout)])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_cudnn_is_refused_in_deterministic_mode():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(NotImplementedError, match=r"cudnn.*deterministic"):
            s2_attention(*inputs(1, 4, 2, 256), 64, backend="cudnn")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    qkv = inputs(1, 4, 2, 512, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = s2_attention(*qkv, 128, backend=backend)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, qkv, torch.ones_like(out))
    want = s2_attention_reference(*qkv, 128)
    for a, b in zip([out, *grads], [want, *torch.autograd.grad(want, qkv, torch.ones_like(want))], strict=True):
        assert error(a, b) < 0.02
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", [x for x in BACKENDS if x != "flex"])
def test_gradient_checkpointing(backend, use_reentrant):
    qkv = inputs(1, 8, 2, 1024, 128)
    call = lambda *x: s2_attention(*x, 256, backend=backend)  # noqa: E731
    plain = torch.autograd.grad(call(*qkv).float().square().sum(), qkv)
    checkpoint(call, *qkv, use_reentrant=use_reentrant).float().square().sum().backward()
    assert all(error(x.grad, g) < 0.01 for x, g in zip(qkv, plain, strict=True))


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x not in ("cudnn", "flex", "sdpa")])
def test_compiles_once_for_all_lengths_without_a_break(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def layer(q, k, v):
        return s2_attention(q * 1.0, k, v, 256, backend=backend).float().tanh()

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for length in (1024, 768, 1500):
        qkv = inputs(1, 8, 2, length, 128)
        for x in qkv:
            torch._dynamo.mark_dynamic(x, 2)
        got, want = compiled(*qkv), layer(*qkv)
        assert error(got, want) < 0.01
        dout = torch.randn_like(want)
        grads = torch.autograd.grad(got, qkv, dout), torch.autograd.grad(want, qkv, dout)
        assert all(error(a, b) < 0.01 for a, b in zip(*grads, strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x not in ("flex", "sdpa")])
@pytest.mark.parametrize("is_large", [False, True])
def test_cuda_graph(backend, is_large):
    length, size = (16384, 8192) if is_large else (1024, 256)
    qkv = inputs(1, 16, 4, length, 128)
    dout = torch.randn(1, length, 16, 128, device="cuda", dtype=torch.bfloat16)

    def step():
        out = s2_attention(*qkv, size, backend=backend)
        return [out, *torch.autograd.grad(out, qkv, dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = step()
    with torch.no_grad():
        for x in (*qkv, dout):
            x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(error(a, b) < 0.01 for a, b in zip(recorded, step(), strict=True))


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x != "flex"])
def test_many_layers_in_flight_do_not_disturb_each_other(backend):
    """Side streams and reused memory: a chain of large calls with no wait equals the same chain with waits."""

    weight = torch.randn(1, 8192, 16, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    def chain(wait):
        torch.manual_seed(0)
        x = torch.randn(1, 8192, 16, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        y = x
        for _ in range(6):
            junk = torch.full((64, 1024, 1024), float("nan"), device="cuda")
            y = s2_attention(y, y[:, :4], y[:, 4:8], 4096, backend=backend).transpose(1, 2)
            y = torch.nn.functional.rms_norm(y, (128,))
            del junk
            if wait:
                torch.cuda.synchronize()
        (grad,) = torch.autograd.grad(y, x, weight)
        return y, grad

    first, second = chain(True), chain(False)
    assert torch.equal(first[0], second[0])
    assert error(second[1], first[1]) < 0.02


@pytest.mark.parametrize("backend", [x for x in ("flash_attention_4", "flex") if x in BACKENDS])
def test_softcap(backend):
    qkv = inputs(1, 4, 2, 256, 128)
    with torch.no_grad():
        qkv[0].mul_(3)
    got = attend(*qkv, Cuts.of(plan_groups(1, 256, 256)), Options(softcap=5.0, backend=backend))
    q, k, v = plain = [x.detach().float().requires_grad_() for x in qkv]
    scores = 5.0 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * 128**-0.5 / 5.0)
    mask = torch.ones(256, 256, dtype=torch.bool, device="cuda").triu(1)
    want = (scores.masked_fill(mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    dout = torch.randn_like(want)
    grads = torch.autograd.grad(got, qkv, dout.bfloat16()), torch.autograd.grad(want, plain, dout)
    assert error(got, want) < 0.01 and all(error(a, b) < 0.01 for a, b in zip(*grads, strict=True))


def test_the_fastest_is_chosen_and_float32_still_runs():
    if torch.cuda.get_device_capability()[0] == 9 and "flash_attention_4" in BACKENDS:
        query, key, value = inputs(1, 4, 2, 300)
        assert backends.pick_backend(query, key, value, True, Options()).name == "flash_attention_4"
    qkv = inputs(1, 4, 2, 300, dtype=torch.float32)
    compare(lambda *x: s2_attention(*x, 128), qkv, 128)


def test_cudnn_and_sdpa_share_a_process():
    """PyTorch keeps cuDNN's backward for all callers, by q, k and v alone: none may meet another's strides there."""
    for backend in ("cudnn", "sdpa", "cudnn", "varlen", "sdpa"):
        for heads, kv_heads in ((8, 2), (4, 4)):
            torch.manual_seed(0)
            for length in (1024, 1000):
                qkv = inputs(1, heads, kv_heads, length, 128)
                compare(lambda *x, b=backend: s2_attention(*x, 256, backend=b), qkv, 256)


def groups_of_half_the_heads(q, k, v):
    """PyTorch's own cuDNN attention on the straight half, with its q, k and v laid out as they are in a launch here."""
    cut = [x[0, : x.shape[1] // 2].unflatten(1, (-1, 256)).transpose(0, 1) for x in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*cut, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[None]


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
@pytest.mark.parametrize("heads", [(8, 2), (12, 4)], ids=str)
def test_cudnn_is_right_next_to_other_callers_of_cudnn(heads, order):
    """Same shapes and strides of q, k, v, another layout of the output: PyTorch's plans for these may not be mixed."""
    dim = 64 if order == "ours first" else 128  # so that no test finds the plans of another

    def ours(qkv):
        compare(lambda *x: s2_attention(*x, 256, backend="cudnn"), qkv, 256)

    def theirs(qkv):
        compare(
            lambda *x: torch.cat((groups_of_half_the_heads(*x), s2_attention(*x, 256)[:, :, heads[0] // 2 :]), 2),
            qkv,
            256,
        )

    calls = [ours, theirs] if order == "ours first" else [theirs, ours]
    for call in calls * 2:
        call(inputs(1, *heads, 1024, dim))


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_cudnn_is_right_for_one_layout_after_another(name):
    """Slices of a wider tensor, and the gradient of a wider output: the layouts of fused projections."""
    for is_wide in (False, True, False):
        q, k, v = inputs(1, 8, 2, 1024, 96)
        wide = {x: torch.randn(1, 1024, 24, 96, device="cuda", dtype=torch.bfloat16) for x in ("q", "k", "v")}
        if is_wide and name != "out":
            sizes = dict(q=8, k=2, v=2)
            q, k, v = (
                wide[x][:, :, : sizes[x]].transpose(1, 2).detach().requires_grad_() if x == name else y
                for x, y in zip("qkv", (q, k, v), strict=True)
            )
        dout = torch.randn(1, 1024, 24, 96, device="cuda", dtype=torch.bfloat16)[:, :, :8]
        dout = dout if is_wide and name == "out" else dout.contiguous()
        compare(lambda *x: s2_attention(*x, 256, backend="cudnn"), [q, k, v], 256, dout=dout.float() * 1)
        got = s2_attention(q, k, v, 256, backend="cudnn")
        grads = torch.autograd.grad(got, (q, k, v), dout)
        dense = s2_attention(*(x.contiguous() for x in (q, k, v)), 256, backend="varlen")
        wanted = torch.autograd.grad(dense, (q, k, v), dout.contiguous())
        assert all(error(a, b) < 0.01 for a, b in zip(grads, wanted, strict=True))


def test_out_of_memory_leaves_nothing_behind():
    qkv = inputs(1, 8, 2, 2048, 128)
    s2_attention(*qkv, 512)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            huge = inputs(1, 8, 2, 2**18, 128)
            s2_attention(*huge, 8192)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.memory_allocated() <= before + 2**26
    compare(lambda *x: s2_attention(*x, 512), qkv, 512)


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x not in ("flex",)])
def test_peak_memory_is_full_attention_s(backend):
    def peak(pattern):
        qkv = inputs(1, 16, 4, 32768, 128)
        groups = plan_groups(1, 32768, 8192, pattern)
        dout = torch.randn(1, 32768, 16, 128, device="cuda", dtype=torch.bfloat16)
        for _ in range(2):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.autograd.grad(attend(*qkv, Cuts.of(groups), Options(backend=backend)), qkv, dout)
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak("s2") <= (1.01 if backend == "flash_attention_4" else 2.0) * peak("full")


@pytest.mark.parametrize("backend", ["flex", "sdpa", "flash_attention_4"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (8, 2, 128), (4, 4, 96)])
@pytest.mark.parametrize("pattern", BLOCK_PATTERNS)
def test_patterns_of_blocks(pattern, heads, kv_heads, dim, backend):
    """Packed and padded: values and gradients of the reference, and no token sees a later one."""
    if backend == "flash_attention_4":
        needs = Needs(torch.device("cuda"), torch.bfloat16, dim, dim, requires_grad=True, blocks=pattern)
        if reason := backends.BACKENDS[backend].missing(needs.device) or backends.BACKENDS[backend].lacks(needs):
            pytest.skip(reason)
    q, k, v = inputs(1, heads, kv_heads, 2000, dim)
    ids = torch.cat([torch.full((n,), i) for i, n in ((0, 30), (1, 1200), (2, 700), (0, 70))])[None].cuda()
    how = dict(segment_ids=ids, pattern=pattern, chosen_blocks=1)
    out = s2_attention(q, k, v, 256, backend=backend, **how)
    plain = [x.detach().float().requires_grad_() for x in (q, k, v)]
    want = s2_attention_reference(*plain, 256, **how)
    assert error(out, want) < 0.01
    dout = torch.randn_like(out)
    found, expected = torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(want, plain, dout.float())
    for grad, true in zip(found, expected, strict=True):
        assert error(grad, true) < 0.02
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, 1100:1230] = torch.randn_like(x[:, :, 1100:1230])
        after = s2_attention(q, k, v, 256, backend=backend, **how)
    assert torch.equal(after[:, :1100], out[:, :1100]) and not torch.equal(after[:, 1100:1230], out[:, 1100:1230])

"""The choice of a backend, its refusals, and bad input; on a CPU."""

import logging
import sys
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from peft_longlora import s2_attention
from peft_longlora.kernels import backends, flash
from peft_longlora.kernels.aten import CudnnAttention
from peft_longlora.kernels.attend import attend
from peft_longlora.kernels.cuts import Cuts
from peft_longlora.kernels.groups import plan_groups
from peft_longlora.kernels.kernel import Kernel, Needs, Options, Pieces
from peft_longlora.kernels.operators import KERNELS
from peft_longlora.reference import s2_attention_reference
from peft_longlora.sequence.halo import attend_far, attend_far_backward
from tests.helpers import plain_kernel

CPU = torch.device("cpu")


def inputs(batch=1, heads=4, kv_heads=2, length=40, dim=16, dtype=torch.float32, value_dim=None):
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)
    return [torch.randn(batch, length, h, d, dtype=dtype).transpose(1, 2).requires_grad_() for h, d in shapes]


@pytest.mark.parametrize("backend", ["flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "cudnn"])
def test_cpu_tensors_to_a_cuda_backend_are_refused(backend):
    with pytest.raises(ValueError, match=rf"backend='{backend}' is not available.*CUDA.*'cpu'.*backend=None"):
        s2_attention(*inputs(), 16, backend=backend)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend='fa4' is unknown.*'flash_attention_4'"):
        s2_attention(*inputs(), 16, backend="fa4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k.double(), v), "float32, torch.float64, torch.float32: use one dtype"),
        (lambda q, k, v: (q, k.to("meta"), v), "are on cpu, meta and cpu"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "floating point"),
        (lambda q, k, v: (q[:, :3], k, v), "3 query heads cannot be divided evenly among 2 KV heads"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "4 query heads cannot be divided evenly among 0 KV heads"),
        (lambda q, k, v: (q, k[:, :, :30], v[:, :, :30]), r"key \(1, 2, 30, 16\).*whole sequences"),
        (lambda q, k, v: (q, k, v[:, :1]), r"value \(1, 1, 40, 16\)"),
        (lambda q, k, v: (q, k[..., :8], v), r"key \(1, 2, 40, 8\)"),
        (lambda q, k, v: (q[0], k[0], v[0]), "4 dimensions"),
    ],
    ids=["dtypes", "devices", "integers", "heads", "no KV heads", "lengths", "KV heads", "dims", "three dims"],
)
def test_tensors_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        s2_attention(*change(*inputs()), 16)


@pytest.mark.parametrize("dropout", [-0.1, 1.5, float("nan")])
def test_dropout_that_is_no_probability(dropout):
    q, k, v = inputs()
    with pytest.raises(ValueError, match=rf"dropout={dropout} is outside \[0, 1\]"):
        s2_attention(q, k, v, 16, dropout=dropout)


@pytest.mark.parametrize("group_size", [0, 1, 3, -2, 16.0, True])
def test_group_sizes_that_cannot_be_halved(group_size):
    with pytest.raises(ValueError, match="group_size="):
        s2_attention(*inputs(), group_size)


def test_segment_ids_of_another_shape_or_type():
    q, k, v = inputs(batch=2)
    with pytest.raises(ValueError, match=r"segment_ids has shape \(2, 39\): it must be \(B, S\) = \(2, 40\)"):
        s2_attention(q, k, v, 16, segment_ids=torch.ones(2, 39, dtype=torch.long))
    with pytest.raises(ValueError, match=r"segment_ids is torch\.float32"):
        s2_attention(q, k, v, 16, segment_ids=torch.ones(2, 40))


def test_a_group_longer_than_the_row_is_dense():
    q, k, v = inputs()
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(s2_attention(q, k, v, 4096), dense)


@pytest.mark.parametrize(("batch", "length"), [(1, 0), (0, 8)])
@pytest.mark.parametrize("with_segments", [False, True])
def test_no_tokens_give_an_empty_result_that_can_be_differentiated(batch, length, with_segments):
    q, k, v = inputs(batch, length=length, value_dim=8)
    ids = torch.ones(batch, length, dtype=torch.long) if with_segments else None
    out = s2_attention(q, k, v, 16, segment_ids=ids)
    assert out.shape == (batch, length, 4, 8) and out.dtype == q.dtype
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_autocast_takes_mixed_dtypes_as_sdpa_does():
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = s2_attention(q, k.bfloat16(), v, 16)
    assert out.dtype == torch.bfloat16
    assert (out - s2_attention_reference(q, k, v, 16)).abs().max() < 0.05
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_what_a_backend_lacks_is_said_before_it_runs():
    call = dict(device=CPU, dtype=torch.bfloat16, dim=64, value_dim=64)
    fa2, cudnn = KERNELS["flash_attention_2"], KERNELS["cudnn"]
    assert fa2.lacks(Needs(**call)) is None
    assert "float32" in fa2.lacks(Needs(**{**call, "dtype": torch.float32}))
    assert "dropout=0.1" in fa2.lacks(Needs(**call, dropout=0.1))
    assert "window" in cudnn.lacks(Needs(**call, has_window=True)) and fa2.lacks(Needs(**call, has_window=True)) is None
    assert "up to 256, not 512" in fa2.lacks(Needs(**{**call, "dim": 512, "value_dim": 512}))
    assert "not 60" in fa2.lacks(Needs(**{**call, "dim": 60, "value_dim": 60}))
    assert "not 32 and 64" in fa2.lacks(Needs(**{**call, "value_dim": 32}))
    assert "if queries share KV heads" in Kernel.lacks(
        KERNELS["flash_attention_4"], Needs(**{**call, "value_dim": 32}, is_grouped=True)
    )
    assert Kernel.lacks(KERNELS["flash_attention_4"], Needs(**{**call, "value_dim": 32})) is None
    assert fa2.lacks(Needs(**call, softcap=30.0)) is None
    assert "softcap=30.0" in cudnn.lacks(Needs(**call, softcap=30.0))
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in cudnn.lacks(Needs(**call))
    finally:
        torch.use_deterministic_algorithms(False)


def test_dropout_runs_where_it_can_and_keeps_the_mean():
    q, k, v = inputs(length=16)
    v = torch.ones_like(v)
    out = torch.stack([s2_attention(q, k, v, 8, dropout=0.5) for _ in range(200)])
    assert out.unique().numel() > 2 and abs(out.mean() - 1) < 0.05


def test_softcap_is_refused_where_nothing_can_do_it():
    q, k, v = inputs()
    cuts = Cuts.of(plan_groups(1, 40, 16))
    with pytest.raises(NotImplementedError, match="not sdpa: it has no softcap; not flex: it has no backward on 'cpu'"):
        attend(q, k, v, cuts, Options(softcap=30.0))
    with pytest.raises(NotImplementedError, match="backend='sdpa' cannot run this call: it has no softcap"):
        attend(q, k, v, cuts, Options(softcap=30.0, backend="sdpa"))


@pytest.mark.parametrize("scaling", [None, 0.6])
@pytest.mark.parametrize("rows", [None, [[40]], [[-7, 20, 13]]], ids=str)
def test_flex_agrees_with_the_reference_forward(rows, scaling):
    q, k, v = (x.detach() for x in inputs(length=300))
    ids = None
    if rows:
        ids = torch.ones(1, 300, dtype=torch.long)
        ids[:, :9], ids[:, 140:] = 0, 2
    got = s2_attention(q, k, v, 64, segment_ids=ids, scaling=scaling, backend="flex")
    torch.testing.assert_close(got, s2_attention_reference(q, k, v, 64, segment_ids=ids, scaling=scaling))


def test_flex_takes_anything_at_padding():
    q, k, v = (x.detach() for x in inputs(length=300))
    ids = torch.ones(1, 300, dtype=torch.long)
    ids[:, :70] = ids[:, 290:] = 0
    want = s2_attention(q, k, v, 64, segment_ids=ids, backend="flex")
    for x in (q, k, v):
        x[:, :, :70], x[:, :, 290:] = torch.nan, torch.inf
    assert torch.equal(s2_attention(q, k, v, 64, segment_ids=ids, backend="flex"), want)


def test_single_tokens_beside_far_keys_without_cudnn():
    """cuDNN takes no piece of one token, so its backend computes those by itself, also as a part of a softmax."""
    q, dout = torch.randn(2, 5, 1, 4, 16)
    k, v = torch.randn(2, 5, 1, 2, 16)
    far_k, far_v = torch.randn(2, 5, 2, 4, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wide_k, wide_v = (x.repeat_interleave(2, dim=2) for x in leaves[1:])
    near, far = (torch.einsum("pqhd,pkhd->phqk", *x) * 0.3 for x in ((leaves[0], wide_k), (q, far_k)))
    scores = torch.cat((near, far), dim=3)
    want = torch.einsum("phqk,pkhd->pqhd", scores.softmax(-1), torch.cat((wide_v, far_v), dim=1))

    kernel, found_out, found_lse = CudnnAttention(), torch.empty_like(q), torch.empty(5, 4, 1)
    kernel.forward(q, k, v, found_out, found_lse, Pieces(None, 1), 0.3, 0.0)
    torch.testing.assert_close((found_out, found_lse), (wide_v, near[..., 0]))
    grads = [torch.empty_like(x) for x in (q, k, v)]
    whole = want.detach(), scores.logsumexp(-1).detach()
    kernel.backward(dout, q, k, v, *whole, *grads, Pieces(None, 1), 0.3, 0.0)
    torch.testing.assert_close(tuple(grads), torch.autograd.grad(want, leaves, dout))


@pytest.mark.parametrize("scaling", [None, 0.6])
def test_flex_softcap(scaling):
    q, k, v = (x.detach() * 3 for x in inputs(length=64))
    got = attend(q, k, v, Cuts.of(plan_groups(1, 64, 64)), Options(scaling=scaling, softcap=2.0, backend="flex"))
    scores = 2.0 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * (scaling or 0.25) / 2.0)
    weights = scores.masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    torch.testing.assert_close(got, (weights @ v.repeat_interleave(2, 1)).transpose(1, 2))


def test_the_choice_is_logged_once_with_its_reason(caplog, monkeypatch):
    backends._choose.cache_clear()
    backends._log_once.cache_clear()
    monkeypatch.setattr(backends.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("peft_longlora"), "propagate", True)
    backends.logger.setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        for length in (40, 48):
            s2_attention(*inputs(length=length), 16)
    found = [r.message for r in caplog.records if "S2-Attn runs on" in r.message]
    assert found == ["S2-Attn runs on backend 'sdpa' (cpu), the fastest here."]


def upstream_fa2():
    """A module with the signatures of flash_attn/flash_attn_interface.py, flash-attn 2.8.3."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and (window_size_left, window_size_right) == (-1, -1)
        cuts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *run_forward(q, k, v, *cuts, softmax_scale, causal), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and (window_size_left, window_size_right) == (-1, -1)
        SEEN["deterministic"] = deterministic
        cuts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        run_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, *cuts, softmax_scale, causal)

    return locals()


def upstream_fa3():
    """A module with the signatures of hopper/flash_attn_interface.py, FlashAttention-3."""

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1,
        pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        cuts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *run_forward(q, k, v, *cuts, softmax_scale, causal), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        SEEN["deterministic"] = deterministic
        cuts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        run_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, *cuts, softmax_scale, is_causal)

    return locals()


SEEN: dict[str, bool] = {}


def run_forward(q, k, v, cu_q, cu_k, longest_q, longest_k, scaling, is_causal):
    check_cuts(cu_q, cu_k, longest_q, longest_k, is_causal)
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype)
    for (q_, out_), (k_, v_) in zip(plain_kernel.cut(cu_q, q, out), plain_kernel.cut(cu_k, k, v), strict=True):
        out_.copy_(plain_kernel.forward(q_, k_, v_, scaling, is_causal))
    return out, torch.full((q.shape[1], q.shape[0]), 2.0)


def run_backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, longest_q, longest_k, scaling, is_causal):
    check_cuts(cu_q, cu_k, longest_q, longest_k, is_causal)
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous() and (lse == 2.0).all()
    queries, keys = plain_kernel.cut(cu_q, dout, q, out, dq), plain_kernel.cut(cu_k, k, v, dk, dv)
    for (dout_, q_, out_, dq_), (k_, v_, dk_, dv_) in zip(queries, keys, strict=True):
        grads = plain_kernel.backward(dout_, q_, k_, v_, out_, scaling, is_causal)
        for grad, given in zip((dq_, dk_, dv_), grads, strict=True):
            grad.copy_(given)


def check_cuts(cu_q, cu_k, longest_q, longest_k, is_causal):
    assert not is_causal or (cu_q is cu_k and longest_q == longest_k)
    assert all(cu.dtype == torch.int32 for cu in (cu_q, cu_k))
    assert (cu_q.diff().max(), cu_k.diff().max()) == (longest_q, longest_k)


def test_a_package_with_an_older_interface_counts_as_missing(monkeypatch):
    """flash-attn before 2.7, and FlashAttention-3 from before it was an operator, take other arguments."""

    def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size):
        raise AssertionError("never called")

    def _flash_attn_forward(q, k, v, k_new, v_new, qv, out):
        raise AssertionError("never called")

    monkeypatch.setattr(Kernel, "missing", lambda self, device: None)
    for name, old in (
        ("flash_attention_2", _flash_attn_varlen_forward),
        ("flash_attention_3", _flash_attn_forward),
    ):
        module = types.SimpleNamespace(**{old.__name__: old})
        monkeypatch.setattr(type(KERNELS[name]), "load", lambda self, module=module: module)
        assert "is too old" in KERNELS[name].missing(CPU)
        upstream = types.SimpleNamespace(**(upstream_fa2() if name == "flash_attention_2" else upstream_fa3()))
        monkeypatch.setattr(type(KERNELS[name]), "load", lambda self, module=upstream: module)
        assert KERNELS[name].missing(CPU) is None


@pytest.mark.parametrize(
    ("backend", "name", "upstream"),
    [
        ("flash_attention_2", "flash_attn.flash_attn_interface", upstream_fa2),
        ("flash_attention_3", "flash_attn_interface", upstream_fa3),
    ],
)
def test_call_path_of_packages_that_are_not_installed(backend, name, upstream, monkeypatch):
    """The engine and the adapter against modules with upstream's signatures, which compute by formula."""
    module = types.ModuleType(name)
    module.__dict__.update(upstream())
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(type(KERNELS[backend]), "missing", lambda self, device: None)
    flash.import_module.cache_clear()
    backends._choose.cache_clear()
    try:
        q, k, v = inputs(2, heads=6, kv_heads=2, length=50, dtype=torch.bfloat16)
        ids = torch.ones(2, 50, dtype=torch.long)
        ids[0, :5], ids[1, 30:] = 0, 2
        out = s2_attention(q, k, v, 16, segment_ids=ids, backend=backend)
        plain = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want = s2_attention_reference(*plain, 16, segment_ids=ids)
        dout = torch.randn_like(out)
        torch.testing.assert_close(out.double(), want, rtol=0.02, atol=0.02)
        grads = torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(want, plain, dout.double())
        for got, expected in zip(*grads, strict=True):
            assert (got.double() - expected).norm() < 0.02 * expected.norm()
        assert SEEN["deterministic"] is False
        compare_far(backend)
    finally:
        flash.import_module.cache_clear()
        backends._choose.cache_clear()


def compare_far(backend):
    """Queries of one rank and keys of another, as `halo` calls a kernel; dense attention by autograd is the truth."""
    q, k, v = (torch.randn(n, h, 16, dtype=torch.bfloat16) for n, h in ((30, 6), (11, 2), (11, 2)))
    plain = [x.double().requires_grad_() for x in (q, k, v)]
    wide = [x.transpose(0, 1) for x in plain]
    want = scaled_dot_product_attention(*wide, scale=0.3, enable_gqa=True).transpose(0, 1)
    out, lse = attend_far(q, k, v, 0.3, 0.0, backend)
    dout = torch.randn_like(out)
    grads = attend_far_backward(dout, q, k, v, out, lse, 0.3, 0.0, backend)
    for got, expected in zip((out, *grads), (want, *torch.autograd.grad(want, plain, dout.double())), strict=True):
        assert (got.double() - expected).norm() < 0.02 * expected.norm()


def test_a_missing_package_names_the_command(monkeypatch):
    """On a GPU of the right kind, what is not installed says how to get it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    flash.import_module.cache_clear()
    flash.download_kernel.cache_clear()
    call = Needs(torch.device("cuda"), torch.bfloat16, 64, 64)
    for name, command in (
        ("flash_attention_4", "pip install flash-attn-4"),
        ("flash_attention_3", "pip install kernels"),
        ("flash_attention_2", "pip install flash-attn --no-build-isolation"),
    ):
        monkeypatch.setattr(KERNELS[name], "may_download", False)
        with pytest.raises(ValueError, match=f"(?s)backend='{name}' is not available: .*import.*{command}"):
            backends._force(name, call)

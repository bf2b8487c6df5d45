"""The SDPA backend against the reference: outputs, gradients, leaks, padding, layouts and copies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from peft_longlora import s2_attention
from peft_longlora.kernels.patterns import PATTERNS
from peft_longlora.reference import s2_attention_reference

# Padded left and right, packed, and both; documents shorter than, equal to and longer than G = 4.
ROWS = {
    "one document": [[1] * 11],
    "packed": [[1] * 3 + [2] * 4 + [3] * 7],
    "two packings": [[1] * 5 + [2] * 6, [1] * 2 + [2] * 1 + [3] * 8],
    "left padded": [[0] * 4 + [1] * 7, [1] * 11],
    "right padded": [[1] * 9 + [0] * 2, [1] * 3 + [0] * 8],
    "packed and padded": [[0] * 2 + [1] * 5 + [2] * 4 + [0] * 2, [1] * 13],
    "a row of padding": [[0] * 6, [1] * 6],
}


def make(batch, heads, kv_heads, length, dim=4, dim_v=None, dtype=torch.float64, layout="BHSD", generator=None):
    """q, k, v: contiguous as written, or as models make them, (B, S, H, D) seen as (B, H, S, D)."""
    tensors = []
    for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, dim_v or dim)):
        shape = (batch, h, length, d) if layout == "BHSD" else (batch, length, h, d)
        x = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        tensors.append((x if layout == "BHSD" else x.transpose(1, 2)).detach().requires_grad_())
    return tensors


def forward_and_gradients(attention, tensors, weight, **kwargs):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attention(*leaves, **kwargs)
    return out, *torch.autograd.grad(out, leaves, weight.to(out.dtype))


def assert_equals_reference(tensors, tolerance, **kwargs):
    """Outputs, dq, dk and dv, the reference in float64 whatever the dtype under test."""
    q, _, v = tensors
    weight = torch.randn(q.shape[0], q.shape[2], q.shape[1], v.shape[-1], dtype=torch.float64)
    mine = forward_and_gradients(s2_attention, tensors, weight, backend="sdpa", **kwargs)
    true = forward_and_gradients(s2_attention_reference, [x.double() for x in tensors], weight, **kwargs)
    assert mine[0].shape == true[0].shape and mine[0].dtype == q.dtype
    for name, a, b in zip(("out", "dq", "dk", "dv"), mine, true, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@st.composite
def cases(draw):
    group_size = draw(st.sampled_from([2, 4, 6]))
    length, batch = draw(st.integers(1, 4 * group_size + 1)), draw(st.integers(1, 3))
    kv_heads, per_kv = draw(st.sampled_from([(1, 1), (1, 2), (1, 5), (2, 1), (2, 3), (3, 3), (4, 1), (5, 2)]))
    segment_ids = None
    if draw(st.booleans()):
        rows = []
        for _ in range(batch):
            starts = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4))
            row = torch.zeros(length, dtype=torch.long)
            row[list(starts & set(range(length)))] = 1
            row = row.cumsum(0) + 1
            left, right = draw(st.integers(0, 3)), draw(st.integers(0, 3))
            row[:left] = 0
            row[length - min(right, length) :] = 0
            rows.append(row)
        segment_ids = torch.stack(rows)
    return dict(
        shape=(batch, kv_heads * per_kv, kv_heads, length),
        dim_v=draw(st.sampled_from([4, 4, 3])),
        layout=draw(st.sampled_from(["BHSD", "BSHD"])),
        group_size=group_size,
        segment_ids=segment_ids,
        pattern=draw(st.sampled_from(PATTERNS)),
        scaling=draw(st.sampled_from([None, None, 0.3])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=str)
@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_equals_reference(dtype, tolerance, case):
    case = dict(case)
    generator = torch.Generator().manual_seed(case.pop("seed"))
    shape, dim_v, layout = (case.pop(name) for name in ("shape", "dim_v", "layout"))
    assert_equals_reference(make(*shape, 4, dim_v, dtype, layout, generator), tolerance, **case)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_equals_reference_on_named_rows(rows, layout):
    ids = torch.tensor(rows)
    for heads, kv_heads in ((4, 4), (9, 3), (8, 2), (4, 1), (1, 1), (5, 5)):
        tensors = make(ids.shape[0], heads, kv_heads, ids.shape[1], layout=layout)
        assert_equals_reference(tensors, 1e-11, group_size=4, segment_ids=ids)


@pytest.mark.parametrize("layouts", [("BHSD", "BSHD", "BSHD"), ("BSHD", "BHSD", "BHSD"), ("BSHD", "BSHD", "BHSD")])
def test_layouts_may_differ(layouts):
    """A cache or a norm may have made one of q, k, v contiguous and left the others as they were."""
    tensors = [make(2, 6, 3, 11, layout=layout)[i] for i, layout in enumerate(layouts)]
    assert_equals_reference(tensors, 1e-11, group_size=4, segment_ids=torch.tensor(ROWS["two packings"]))


def test_views_of_one_fused_projection():
    """phi3 and gpt_neox cut q, k, v out of one tensor."""
    fused = torch.randn(2, 11, 3, 4, 8, dtype=torch.float64)
    assert_equals_reference([x.transpose(1, 2) for x in fused.unbind(2)], 1e-11, group_size=4)
    cut = torch.randn(2, 11, 8 * 4, dtype=torch.float64).split((16, 8, 8), dim=-1)
    tensors = [x.view(2, 11, -1, 4).transpose(1, 2) for x in cut]
    assert_equals_reference(tensors, 1e-11, group_size=4, segment_ids=torch.tensor(ROWS["left padded"]))


def test_documents_longer_than_the_padding_pieces():
    """Hundreds of tokens of padding, on both sides, and many equal groups in a row."""
    ids = torch.zeros(2, 420, dtype=torch.long)
    ids[0, 290:] = 1
    ids[1, :130] = 1
    ids[1, 130:141] = 2
    assert_equals_reference(make(2, 4, 2, 420), 1e-11, group_size=16, segment_ids=ids)


def visible(segment_ids: list[int], group_size: int, shift: int) -> torch.Tensor:
    """(S, S) bool by the contract's words: same document, not later, same group."""
    length = len(segment_ids)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for t in range(length):
        for s in range(t + 1):
            document = segment_ids[t]
            if document == 0 or segment_ids[s] != document:
                continue
            start, tokens = segment_ids.index(document), segment_ids.count(document)
            groups = [(x - start - shift) // group_size for x in (s, t)]
            mask[t, s] = tokens <= group_size or groups[0] == groups[1]
    return mask


@pytest.mark.parametrize(("heads", "kv_heads", "straight"), [(4, 2, 2), (3, 1, 1)])
@pytest.mark.parametrize("name", ["packed", "packed and padded", "left padded", "right padded"])
def test_no_token_sees_a_later_one_or_another_document(name, heads, kv_heads, straight):
    """dq, dk, dv of each output token are exactly 0 at what it may not see, and dv is not 0 at what it may."""
    ids = torch.tensor(ROWS[name])
    batch, length = ids.shape
    q, k, v = make(batch, heads, kv_heads, length, layout="BSHD")
    out = s2_attention(q, k, v, 4, segment_ids=ids, backend="sdpa")
    for row, values in enumerate(ids.tolist()):
        halves = [(slice(0, straight), visible(values, 4, 0)), (slice(straight, heads), visible(values, 4, 2))]
        for t in range(length):
            for which, mask in halves:
                dq, dk, dv = torch.autograd.grad(out[row, t, which].sum(), (q, k, v), retain_graph=True)
                touched = [x.abs().amax((1, 3)) for x in (dq, dk, dv)]
                expected = torch.zeros(batch, length, dtype=torch.bool)
                expected[row] = mask[t]
                assert torch.equal(touched[2] != 0, expected)
                assert (touched[1][~expected] == 0).all()
                expected[row] = torch.arange(length) == t
                assert (touched[0][~expected] == 0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_packed_documents_equal_the_same_documents_alone(pattern, layout):
    lengths = [3, 11, 1, 4, 6]
    tensors = make(1, 6, 3, sum(lengths), layout=layout)
    ids = torch.repeat_interleave(torch.arange(5) + 1, torch.tensor(lengths))[None]
    weight = torch.randn(1, sum(lengths), 6, 4, dtype=torch.float64)
    kwargs = dict(group_size=4, pattern=pattern, backend="sdpa")
    packed = forward_and_gradients(s2_attention, tensors, weight, segment_ids=ids, **kwargs)
    alone = [
        forward_and_gradients(s2_attention, parts, w, **kwargs)
        for *parts, w in zip(*(x.split(lengths, dim=2) for x in tensors), weight.split(lengths, dim=1), strict=True)
    ]
    for i, (together, *parts) in enumerate(zip(packed, *alone, strict=True)):
        joined = torch.cat(parts, dim=2 if i else 1)
        torch.testing.assert_close(together, joined, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [1e30, -1e30, float("inf")])
@pytest.mark.parametrize("rows", [ROWS["packed and padded"], [[0] * 5, [0] * 5]], ids=["some", "nothing but padding"])
def test_padding_is_exactly_zero_whatever_it_holds(garbage, rows):
    ids = torch.tensor(rows)
    q, k, v = make(2, 4, 2, ids.shape[1], layout="BSHD", dtype=torch.float32)
    with torch.no_grad():
        for x in (q, k, v):
            x.transpose(1, 2)[ids == 0] = garbage
    out = s2_attention(q, k, v, 4, segment_ids=ids, backend="sdpa")
    assert out.isfinite().all() and (out[ids == 0] == 0).all()
    for gradient in torch.autograd.grad((out + out * out).sum(), (q, k, v)):
        assert gradient.isfinite().all()
        assert (gradient.transpose(1, 2)[ids == 0] == 0).all()


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_gradients_exist_where_only_one_input_is_trained_and_all_is_padding(trained):
    tensors = make(1, 2, 2, 5)
    for i, x in enumerate(tensors):
        x.requires_grad_(i == trained)
    s2_attention(*tensors, 4, segment_ids=torch.zeros(1, 5, dtype=torch.long), backend="sdpa").sum().backward()
    assert (tensors[trained].grad == 0).all()


class Recorder(TorchDispatchMode):
    """Storages of the big tensors that operators make and, apart, of those that attention kernels read."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.made, self.read = size, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        is_attention = "scaled_dot_product" in function.name()
        if is_attention:
            self.read += [x.untyped_storage().data_ptr() for x in args[:3]]
        elif isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in before:
            self.made += [function.name()] * (out.numel() >= self.size)
        return out


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (9, 3), (8, 1)])
@pytest.mark.parametrize("rows", [None, ROWS["packed"], ROWS["packed and padded"], ROWS["two packings"]])
def test_heads_are_split_without_a_copy(layout, heads, kv_heads, rows):
    """Every kernel reads the memory of q, k and v themselves; the one big tensor made is the output, joined."""
    ids = None if rows is None else torch.tensor(rows)
    batch, length = (2, 13) if rows is None else ids.shape
    tensors = make(batch, heads, kv_heads, length, 8, dtype=torch.float32, layout=layout)
    with Recorder(min(x[0].numel() for x in tensors) // 2) as recorder:
        s2_attention(*tensors, 4, segment_ids=ids, backend="sdpa")
    assert recorder.read, "no fused attention kernel ran"
    assert set(recorder.read) == {x.untyped_storage().data_ptr() for x in tensors}
    assert set(recorder.made) <= {"aten::cat", "aten::new_zeros"}, recorder.made


def test_dropout_zero_is_deterministic():
    tensors = make(1, 4, 2, 11)
    first, second = (s2_attention(*tensors, 4, dropout=0.0, backend="sdpa") for _ in range(2))
    assert torch.equal(first, second)


def test_dropout_keeps_the_expectation_and_drops_at_its_rate():
    """Mean over many draws equals the output without dropout; a token with one key is dropped with probability p."""
    draws, p = 1500, 0.25
    # One row of every draw, as models lay tensors out, so that all draws go in one kernel call.
    q, k, v = (x.detach().transpose(1, 2).repeat(draws, 1, 1, 1).transpose(1, 2) for x in make(1, 2, 2, 6))
    out = s2_attention(q, k, v, 4, dropout=p, backend="sdpa")
    plain = s2_attention_reference(q[:1], k[:1], v[:1], 4)[0]
    standard_error = out.std(0) / draws**0.5
    assert ((out.mean(0) - plain).abs() <= 5 * standard_error).all()
    # Token 0 sees itself alone, so its output is v / (1 - p) or 0.
    alone = out[:, 0]
    is_dropped = (alone == 0).all(-1)
    assert is_dropped.double().mean().item() == pytest.approx(p, abs=0.04)
    torch.testing.assert_close(alone[~is_dropped], (v[:, :, 0] / (1 - p))[~is_dropped])


def test_dropout_leaves_padding_zero():
    ids = torch.tensor(ROWS["packed and padded"])
    out = s2_attention(*make(2, 4, 2, 13), 4, segment_ids=ids, dropout=0.5, backend="sdpa")
    assert (out[ids == 0] == 0).all() and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    tensors = make(2, 4, 2, 11, dtype=dtype)
    assert_equals_reference(tensors, 3e-2, group_size=4, segment_ids=torch.tensor(ROWS["two packings"]))


@pytest.mark.parametrize("shape", [(1, 2, 0, 4), (0, 2, 5, 4)])
def test_nothing_in_nothing_out(shape):
    q = torch.zeros(shape)
    batch, heads, length, dim = shape
    assert s2_attention(q, q, q, 4, backend="sdpa").shape == (batch, length, heads, dim)

"""The definition of correct, against masks written by hand and against PyTorch's own attention."""

import ast
import inspect

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from peft_longlora import reference, s2_attention
from peft_longlora.reference import group_ids, s2_attention_reference

# One row a query, one column a key, x = may see. L = 10, G = 4, as in the design's worked example.
STRAIGHT = """
x.........
xx........
xxx.......
xxxx......
....x.....
....xx....
....xxx...
....xxxx..
........x.
........xx
"""
SHIFTED = """
x.........
xx........
..x.......
..xx......
..xxx.....
..xxxx....
......x...
......xx..
......xxx.
......xxxx
"""
# Padding, a document of 3 tokens (fits, dense), one of 6 (cut), padding. G = 4.
PACKED_IDS = [0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0]
PACKED_STRAIGHT = """
...........
.x.........
.xx........
.xxx.......
....x......
....xx.....
....xxx....
....xxxx...
........x..
........xx.
...........
"""
PACKED_SHIFTED = """
...........
.x.........
.xx........
.xxx.......
....x......
....xx.....
......x....
......xx...
......xxx..
......xxxx.
...........
"""


def mask_of(drawing: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in line] for line in drawing.split()])


def by_hand(query, key, value, drawings: list[str], scaling=None) -> torch.Tensor:
    """Attention with one drawn mask a query head, token by token."""
    batch, heads, length, dim = query.shape
    per_kv_head = heads // key.shape[1]
    out = torch.zeros(batch, length, heads, value.shape[-1], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for t, row in enumerate(mask_of(drawings[h])):
                if row.any():
                    k, v = key[b, h // per_kv_head, row], value[b, h // per_kv_head, row]
                    scores = (k @ query[b, h, t]) * (dim**-0.5 if scaling is None else scaling)
                    out[b, t, h] = scores.softmax(0) @ v
    return out


def random_qkv(batch, heads, kv_heads, length, dim=4, dim_v=None, dtype=torch.float64):
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, dim_v or dim)]
    return [torch.randn(batch, h, length, d, dtype=dtype, requires_grad=True) for h, d in shapes]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "straight"), [(4, 4, 2), (4, 2, 2), (9, 3, 3), (6, 1, 3), (3, 1, 1), (1, 1, 0), (5, 5, 2)]
)
def test_worked_example_for_all_head_counts(heads, kv_heads, straight):
    """Heads of KV heads >= H_kv // 2 are shifted; with one KV head, query heads >= H // 2."""
    q, k, v = random_qkv(2, heads, kv_heads, 10)
    expected = by_hand(q, k, v, [STRAIGHT] * straight + [SHIFTED] * (heads - straight))
    torch.testing.assert_close(s2_attention_reference(q, k, v, 4), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("drawing", "shift"), [(STRAIGHT, 0), (SHIFTED, 2)])
def test_group_ids_of_the_worked_example(drawing, shift):
    ids = group_ids(torch.ones(1, 10, dtype=torch.long), 4, shift)[0]
    assert torch.equal((ids[:, None] == ids[None, :]).tril(), mask_of(drawing))


def test_packed_and_padded_row_by_hand():
    q, k, v = random_qkv(1, 2, 2, 11, dim_v=3)
    ids = torch.tensor([PACKED_IDS])
    out = s2_attention_reference(q, k, v, 4, segment_ids=ids, scaling=0.7)
    expected = by_hand(q, k, v, [PACKED_STRAIGHT, PACKED_SHIFTED], scaling=0.7)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert (out[ids == 0] == 0).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()
        assert (gradient.transpose(1, 2)[ids == 0] == 0).all()


def test_local_shifts_no_head():
    q, k, v = random_qkv(1, 4, 4, 10)
    expected = by_hand(q, k, v, [STRAIGHT] * 4)
    torch.testing.assert_close(s2_attention_reference(q, k, v, 4, pattern="local"), expected)


@pytest.mark.parametrize(("length", "pattern"), [(1, "s2"), (3, "s2"), (8, "s2"), (8, "local"), (13, "full")])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_equals_causal_sdpa_where_a_document_fits(length, pattern, scaling):
    q, k, v = random_qkv(2, 6, 3, length, dim_v=5)
    out = s2_attention_reference(q, k, v, 8, pattern=pattern, scaling=scaling)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(out.sin().sum(), (q, k, v)),
        torch.autograd.grad(expected.sin().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_full_keeps_documents_apart():
    q, k, v = random_qkv(1, 2, 2, 12)
    ids = torch.tensor([[1] * 7 + [2] * 5])
    out = s2_attention_reference(q, k, v, 4, segment_ids=ids, pattern="full")
    alone = [
        scaled_dot_product_attention(*(x[:, :, part] for x in (q, k, v)), is_causal=True).transpose(1, 2)
        for part in (slice(0, 7), slice(7, 12))
    ]
    torch.testing.assert_close(out, torch.cat(alone, dim=1))


def test_dropout_zero_is_deterministic_and_one_drops_everything():
    q, k, v = random_qkv(1, 2, 2, 10)
    assert torch.equal(s2_attention_reference(q, k, v, 4), s2_attention_reference(q, k, v, 4, dropout=0.0))
    assert (s2_attention_reference(q, k, v, 4, dropout=1.0) == 0).all()


def test_same_signature_as_the_fast_path_and_torch_alone():
    """The contract: the signature of `s2_attention` less `backend`, under 60 lines, plain PyTorch."""
    fast = dict(inspect.signature(s2_attention).parameters)
    del fast["backend"]
    mine = inspect.signature(s2_attention_reference).parameters
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [(p.name, p.kind, p.default) for p in fast.values()]
    source = inspect.getsource(reference)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {(n.names[0].name if isinstance(n, ast.Import) else n.module) for n in imports} == {"torch", "__future__"}
    assert len(inspect.getsource(s2_attention_reference).splitlines()) < 60

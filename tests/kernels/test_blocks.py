"""Patterns that see blocks of keys, against the reference: values, gradients, and that no choice looks ahead."""

import numpy as np
import pytest
import torch

from peft_longlora import s2_attention
from peft_longlora.kernels.blocks import BLOCK, BlockPlan, default_blocks
from peft_longlora.kernels.patterns import BLOCK_PATTERNS
from peft_longlora.reference import s2_attention_reference
from tests.helpers.largest import Largest

# name: B, S, H, H_kv, D, D_v, documents of each row (a negative length is padding)
CASES = {
    "whole blocks": (1, 1024, 4, 2, 16, 16, None),
    "two rows, a short last block": (2, 900, 4, 2, 16, 16, None),
    "packed": (1, 1100, 6, 3, 16, 8, [[300, 500, 100, 200]]),
    "packed and padded": (2, 800, 4, 1, 16, 16, [[-30, 700, -10, 60], [513, 129, -158]]),
    "one KV head a head": (1, 700, 3, 3, 16, 16, None),
    "short documents only": (1, 700, 4, 2, 16, 16, [[250, 200, 250]]),
}
G = 256


def segments(documents):
    if documents is None:
        return None
    rows = [[i + 1 if n > 0 else 0 for i, n in enumerate(row) for _ in range(abs(n))] for row in documents]
    return torch.tensor(rows)


def inputs(name, dtype=torch.float32):
    batch, length, heads, kv_heads, dim, value_dim, documents = CASES[name]
    torch.manual_seed(3)
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    # in the layout of a projection: (B, S, H, D) in memory
    qkv = [torch.randn(batch, length, h, d, dtype=dtype).transpose(1, 2).requires_grad_() for h, d in sizes]
    return qkv, segments(documents)


@pytest.mark.parametrize("chosen", [None, 2])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pattern", BLOCK_PATTERNS)
def test_values_and_gradients_are_the_reference_s(pattern, name, chosen):
    qkv, ids = inputs(name)
    how = dict(segment_ids=ids, pattern=pattern, chosen_blocks=chosen, scaling=0.3)
    out, want = s2_attention(*qkv, G, **how), s2_attention_reference(*qkv, G, **how)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    if ids is not None:
        assert not out[ids == 0].any()
    dout = torch.randn_like(out)
    for found, expected in zip(*(torch.autograd.grad(x, qkv, dout) for x in (out, want)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pattern", BLOCK_PATTERNS)
def test_flex_agrees_with_the_reference_forward(pattern, name):
    qkv, ids = inputs(name)
    qkv = [x.detach() for x in qkv]
    how = dict(segment_ids=ids, pattern=pattern, chosen_blocks=2)
    out = s2_attention(*qkv, G, backend="flex", **how)
    torch.testing.assert_close(out, s2_attention_reference(*qkv, G, **how), rtol=1e-4, atol=1e-5)


def test_the_block_lists_of_flex_are_what_its_rule_says():
    """A GPU reads the lists, and asks the rule in blocks that are not whole; a CPU asks the rule alone."""
    from peft_longlora.kernels.flex import _mask_of_seen

    for pattern in BLOCK_PATTERNS:
        (q, k, _), ids = inputs("packed")
        documents = [(0, 300, 1), (300, 500, 2), (800, 100, 3), (900, 200, 4)]
        plan = BlockPlan.of(1, ids.shape[1], documents, G, pattern, 1)
        q, k = plan.arrange(q), plan.arrange(k)
        mask = _mask_of_seen(plan, plan.find_seen(q, k), len(q))
        count, places = mask.kv_indices.shape[-1], torch.arange(q.shape[1])
        for head in range(len(q)):
            rule = mask.mask_mod(0, torch.tensor(head), places[:, None], places[None])
            tiles = rule.unflatten(1, (count, BLOCK)).unflatten(0, (count, BLOCK)).transpose(1, 2)
            for block in range(count):
                partial, whole = (
                    set(indices[0, head, block, : numbers[0, head, block]].tolist())
                    for numbers, indices in (
                        (mask.kv_num_blocks, mask.kv_indices),
                        (mask.full_kv_num_blocks, mask.full_kv_indices),
                    )
                )
                assert not partial & whole
                assert whole == {i for i in range(count) if tiles[block, i].all()}
                assert partial >= {i for i in range(count) if tiles[block, i].any()} - whole


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("pattern", BLOCK_PATTERNS)
def test_no_token_and_no_choice_sees_a_later_one(pattern, backend):
    (q, k, v), _ = inputs("whole blocks")
    q, k, v = (x.detach() for x in (q, k, v))
    before = s2_attention(q, k, v, G, pattern=pattern, chosen_blocks=1, backend=backend)
    for token in (900, 641, 897, 1023):  # inside a block, its second, its last
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, token:] = torch.randn_like(x[:, :, token:]) * 9
        after = s2_attention(*changed, G, pattern=pattern, chosen_blocks=1, backend=backend)
        torch.testing.assert_close(after[:, :token], before[:, :token], rtol=1e-5, atol=1e-6)


def test_the_choice_finds_what_is_asked_for():
    """One block's keys point where later queries ask: it is seen, and the others are not."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 1280, 8) * 0.1 for _ in range(3))
    q[..., 0], k[:, :, 384:512, 0] = 3.0, 3.0
    v[:] = 0
    v[:, :, 384:512] = 1
    out = s2_attention(q, k, v, G, pattern="adaptive", chosen_blocks=1)[0, :, 0, 0]
    assert (out[768:] > 0.8).all()
    v[:, :, 384:512] = 0
    v[:, :, 512:640] = 1  # a block that is not chosen once it is no longer near
    assert not s2_attention(q, k, v, G, pattern="adaptive", chosen_blocks=1)[0, 768:].any()


def test_the_choice_makes_no_float32_copy_of_the_row():
    tokens = 16 * BLOCK
    plan = BlockPlan.of(1, tokens, [(0, tokens, 1)], 2 * BLOCK, "adaptive", 2)
    q, k = torch.randn(4, tokens, 64).bfloat16(), torch.randn(2, tokens, 64).bfloat16()
    with Largest(torch.float32) as seen:
        found = plan.find_seen(q, k)
    assert 0 < seen.numel <= 2 * 4 * tokens // BLOCK * 64
    assert torch.equal(found, plan.find_seen(q.float(), k.float()))  # and sums in float32


@pytest.mark.parametrize("pattern", BLOCK_PATTERNS)
def test_packed_documents_are_as_each_alone(pattern):
    (q, k, v), ids = inputs("packed")
    whole = s2_attention(q, k, v, G, segment_ids=ids, pattern=pattern, chosen_blocks=1)
    parts = [x.split([300, 500, 100, 200], dim=2) for x in (q, k, v)]
    alone = [s2_attention(*part, G, pattern=pattern, chosen_blocks=1) for part in zip(*parts, strict=True)]
    torch.testing.assert_close(whole, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("pattern", BLOCK_PATTERNS)
def test_padding_may_hold_anything(pattern, backend):
    qkv, ids = inputs("packed and padded")
    qkv = [x.detach() for x in qkv]
    how = dict(segment_ids=ids, pattern=pattern, backend=backend)
    want = s2_attention(*qkv, G, **how)
    for x in qkv:
        x.transpose(1, 2)[ids == 0] = torch.nan
    assert torch.equal(s2_attention(*qkv, G, **how), want)
    nothing = s2_attention(*qkv, G, **{**how, "segment_ids": torch.zeros_like(ids)})
    assert nothing.shape == want.shape and not nothing.any()


def test_pieces_of_the_work_give_the_same(monkeypatch):
    from peft_longlora.kernels import sdpa

    qkv, ids = inputs("packed and padded")
    want = torch.autograd.grad(s2_attention(*qkv, G, segment_ids=ids, pattern="adaptive").sin().sum(), qkv)
    monkeypatch.setattr(sdpa, "MOST_SCORES", BLOCK * BLOCK * 7)
    found = torch.autograd.grad(s2_attention(*qkv, G, segment_ids=ids, pattern="adaptive").sin().sum(), qkv)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_default_costs_what_groups_cost():
    """Keys of a query, on average over a long document: G / 2 with groups."""
    for size in (1024, 4096, 8192):
        chosen = default_blocks(size)
        assert chosen == size // 256 - 3
        assert abs((chosen + 2) * BLOCK + BLOCK / 2 - size / 2) <= BLOCK
    assert default_blocks(256) == 1


@pytest.mark.parametrize("backend", ["flash_attention_2", "varlen", "cudnn"])
def test_a_backend_of_groups_is_refused(backend, monkeypatch):
    from peft_longlora.kernels import operators

    monkeypatch.setattr(type(operators.KERNELS[backend]), "missing", lambda self, device: None)
    with pytest.raises(
        NotImplementedError, match=f"backend='{backend}' cannot run this call: it attends inside groups"
    ):
        s2_attention(*inputs("whole blocks")[0], G, pattern="adaptive", backend=backend)


@pytest.mark.parametrize("chosen", [0, -1, 1.5, True, "2"])
def test_what_is_no_number_of_blocks_is_refused(chosen):
    with pytest.raises(ValueError, match="must be a whole number of blocks of 128 keys"):
        s2_attention(*inputs("whole blocks")[0], G, pattern="adaptive", chosen_blocks=chosen)


def test_a_number_of_numpy_is_a_number_of_blocks():
    qkv, _ = inputs("whole blocks")
    found, want = (s2_attention(*qkv, G, pattern="adaptive", chosen_blocks=x) for x in (np.int64(2), 2))
    assert torch.equal(found, want)

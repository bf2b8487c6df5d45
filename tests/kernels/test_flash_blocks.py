"""FlashAttention-4 on lists of blocks, with its functions replaced by their definition: the CPU has no kernel."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peft_longlora import s2_attention
from peft_longlora.kernels import backends, flash_blocks
from peft_longlora.kernels.blocks import BLOCK, BlockPlan
from peft_longlora.kernels.flash_blocks import attend_seen
from peft_longlora.kernels.kernel import Needs, Options
from peft_longlora.memory import keep_attention
from peft_longlora.reference import s2_attention_reference
from tests.kernels.test_blocks import CASES, G, inputs


class Dense:
    """FlashAttention-4's functions for lists of blocks by their definition: a mask from the lists, then softmax."""

    @staticmethod
    def score(q, k, mask, scale):
        """(1, N, H, D), (1, N, H_kv, D) -> (H, N, N)."""
        q, k = (x[0].transpose(0, 1) for x in (q, k))
        return (q @ k.repeat_interleave(len(q) // len(k), 0).mT * scale).masked_fill(~mask, -torch.inf)

    @staticmethod
    def mask(lists, by_key):
        *lists, size = lists
        assert size == (BLOCK, BLOCK) and all(x.dtype == torch.int32 and x.is_contiguous() for x in lists)
        heads, blocks = lists[0].shape[1:]
        sees = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
        for counts, numbers, is_whole in ((*lists[:2], False), (*lists[2:], True)):
            for head in range(heads):
                for row in range(blocks):
                    named = numbers[0, head, row, : counts[0, head, row]].tolist()
                    assert len(set(named)) == len(named) and not sees[head, row, named].any()
                    assert (row in named) != is_whole  # of its own block a query sees a part, of others all
                    sees[head, row, named] = True
        sees = sees.mT if by_key else sees
        return sees.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2).tril()

    @classmethod
    def _flash_attn_fwd(cls, q, k, v, *, block_sparse_tensors, softmax_scale, causal, out, lse, pack_gqa):
        assert causal and not pack_gqa
        scores = cls.score(q, k, cls.mask(block_sparse_tensors, by_key=False), softmax_scale)
        v = v[0].transpose(0, 1).repeat_interleave(q.shape[2] // v.shape[2], 0)
        out[0], lse[0] = (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)

    @classmethod
    def _flash_attn_bwd(cls, q, k, v, out, dout, lse, *, block_sparse_tensors, softmax_scale, causal, dq, dk, dv):
        assert causal
        heads, each = q.shape[2], q.shape[2] // k.shape[2]
        mine, values, grads, found = (x[0].transpose(0, 1) for x in (q, v, dout, out))
        keys, values = (x.repeat_interleave(each, 0) for x in (k[0].transpose(0, 1), values))
        weights = (
            cls.score(q, k, cls.mask(block_sparse_tensors, by_key=True), softmax_scale) - lse[0, ..., None]
        ).exp()
        dscores = weights * (grads @ values.mT - (grads * found).sum(-1, keepdim=True)) * softmax_scale
        dq[0] = (dscores @ keys).transpose(0, 1)
        for into, every in ((dk, dscores.mT @ mine), (dv, weights.mT @ grads)):
            into[0] = every.unflatten(0, (heads // each, each)).sum(1).transpose(0, 1)

    @staticmethod
    def BlockSparseTensorsTorch(*lists, block_size):
        return *lists, block_size


@pytest.fixture
def dense(monkeypatch):
    monkeypatch.setattr(flash_blocks, "_interface", lambda: Dense)
    monkeypatch.setattr(flash_blocks, "import_module", lambda name: Dense)
    monkeypatch.setattr(backends, "choose_backend", lambda *_: "flash_attention_4")


@pytest.mark.parametrize("chosen", [None, 2])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[4] == case[5]])
def test_the_block_lists_of_flash_attention_4_are_the_reference_s(name, chosen, dense):
    """Both lists: of keys for the forward, of queries for the backward."""
    qkv, ids = inputs(name)
    how = dict(segment_ids=ids, pattern="adaptive", chosen_blocks=chosen, scaling=0.3)
    out, want = s2_attention(*qkv, G, **how), s2_attention_reference(*qkv, G, **how)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    dout = torch.randn_like(out)
    for found, expected in zip(*(torch.autograd.grad(x, qkv, dout) for x in (out, want)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_flash_attention_4_does_not_do_with_blocks(monkeypatch):
    backend, device = backends.BACKENDS["flash_attention_4"], torch.device("cuda")
    call = dict(device=device, dtype=torch.bfloat16, dim=64, value_dim=64, requires_grad=True, blocks="adaptive")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.lacks(Needs(**call)) is None
    for change, reason in (
        (dict(blocks="window"), "'window' end inside one"),
        (dict(dim=192, value_dim=192), "at most 128, not 192, 192"),
        (dict(value_dim=32), "equal and at most 128, not 64, 32"),
        (dict(softcap=30.0), "softcap=30.0 was asked for"),
        (dict(dtype=torch.float32), "not torch.float32"),
    ):
        assert reason in backend.lacks(Needs(**{**call, **change}))
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in backend.lacks(Needs(**call))
        assert backend.lacks(Needs(**{**call, "requires_grad": False})) is None
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "for Hopper" in backend.lacks(Needs(**call))


def test_adaptive_runs_on_flash_attention_4_where_that_can(monkeypatch):
    """On a machine of a given GPU and packages, which these functions stand for."""
    flash, device = backends.BACKENDS["flash_attention_4"], torch.device("cuda")
    monkeypatch.setattr(type(backends.BACKENDS["flex"]), "missing", lambda self, device: None)
    for major, reason, pattern, dim, expected in (
        (9, None, "adaptive", 64, "flash_attention_4"),
        (9, None, "window", 64, "flex"),
        (9, None, "adaptive", 256, "flex"),
        (10, None, "adaptive", 64, "flex"),
        (9, "not installed", "adaptive", 64, "flex"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        monkeypatch.setattr(flash.kernel, "missing", lambda device, reason=reason: reason)
        backends._choose.cache_clear()
        needs = Needs(device, torch.bfloat16, dim, dim, requires_grad=True, blocks=pattern)
        assert backends._choose(None, True, False, needs) == expected
    backends._choose.cache_clear()


@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_operator_is_one_for_autograd_and_for_compilers(dense, has_sinks):
    (q, k, v), _ = inputs("whole blocks")
    plan = BlockPlan.of(1, 1024, [(0, 1024, 1)], G, "adaptive")
    q, k, v = (plan.arrange(x.detach()).transpose(0, 1).requires_grad_() for x in (q, k, v))
    seen = plan.find_seen(q.transpose(0, 1), k.transpose(0, 1))
    sinks = torch.randn(4, requires_grad=True) if has_sinks else None
    torch.library.opcheck(attend_seen, (q, k, v, seen, 0.3, sinks))


def test_sinks_are_one_more_logit(dense):
    """By differences: the loss's slope along every sink."""
    (q, k, v), _ = inputs("whole blocks")
    plan = BlockPlan.of(1, 1024, [(0, 1024, 1)], G, "adaptive")
    backend, sinks = backends.BACKENDS["flash_attention_4"], torch.randn(4, dtype=torch.float64, requires_grad=True)
    q, k, v = (x.detach().double() for x in (q, k, v))

    def attend(sinks):
        return backend.attend_blocks(q, k, v, plan, Options(sinks=sinks))

    mask = torch.zeros(4, 1024, 1024, dtype=torch.bool)
    seen = plan.find_seen(plan.arrange(q), plan.arrange(k)).repeat_interleave(2, 0)
    for head in range(4):
        for block in range(8):
            for held in seen[head, block][seen[head, block] < 8].tolist():
                mask[head, block * BLOCK : (block + 1) * BLOCK, held * BLOCK : (held + 1) * BLOCK] = True
    scores = q[0] @ k[0].repeat_interleave(2, 0).mT * 16**-0.5
    scores = scores.masked_fill(~mask.tril(), -torch.inf)
    every = torch.cat((scores, sinks[:, None, None].expand(-1, 1024, 1)), 2).softmax(-1)
    want = (every[..., :-1] @ v[0].repeat_interleave(2, 0)).transpose(0, 1)[None]
    out, dout = attend(sinks), torch.randn_like(want)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    (found,), (expected,) = (torch.autograd.grad(x, sinks, dout) for x in (out, want))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpointed_block_keeps_its_output(dense, monkeypatch):
    (q, k, v), _ = inputs("whole blocks")
    calls, forward = [], Dense._flash_attn_fwd
    monkeypatch.setattr(Dense, "_flash_attn_fwd", lambda *a, **b: calls.append(1) or forward(*a, **b))

    def block(q):
        return s2_attention(q.sin(), k, v, G, pattern="adaptive").cos().sum()

    found = []
    for run in (block, lambda q: checkpoint(block, q, use_reentrant=False, context_fn=keep_attention)):
        found += torch.autograd.grad(run(q), q)
    assert torch.equal(*found) and len(calls) == 2  # the second run's one forward

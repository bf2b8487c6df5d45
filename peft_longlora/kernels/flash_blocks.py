"""FlashAttention-4 on blocks of keys that are chosen by content, from lists of blocks, on Hopper.

Its forward reads for each block of queries the blocks of keys that it sees, and its backward reads for each block of
keys the blocks of queries that see it. All but a block's own lie wholly before it, so causality is the only mask.
"""

from __future__ import annotations

from typing import Any

import torch

from peft_longlora.kernels.blocks import BLOCK, BlockPlan
from peft_longlora.kernels.flash import import_module
from peft_longlora.kernels.kernel import Needs, Options, is_deterministic
from peft_longlora.kernels.operators import KERNELS, Launched
from peft_longlora.kernels.sinks import add_sinks_, gradient_of_sinks

LISTS = "flash_attn.cute.block_sparsity"
Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def key_blocks(seen: torch.Tensor, heads: int) -> Lists:
    """For each block of queries the blocks of keys that it sees.

    Args:
        seen: (H_kv, blocks, width) from `BlockPlan.find_seen`: ascending, up to the block itself; the number `blocks`
            means none.
        heads: H.

    Returns:
        Int32 lists of blocks that are seen in part, how many, (1, H, blocks), and which, (1, H, blocks, 1): the block
        itself; and of those that are seen whole, (1, H, blocks) and (1, H, blocks, width), these first.
    """
    count = seen.shape[1]
    return _for_heads(heads, (seen < count).sum(-1) - 1, seen.clamp(max=count - 1))


def query_blocks(seen: torch.Tensor, heads: int) -> Lists:
    """For each block of keys the blocks of queries that see it: the same lists read the other way.

    Returns: as `key_blocks`; the last list is (1, H, blocks, blocks).
    """
    count = seen.shape[1]
    block = torch.arange(count, dtype=torch.int32, device=seen.device)
    table = torch.zeros(len(seen), count, count + 1, dtype=torch.bool, device=seen.device).scatter_(2, seen, True)
    sees = table[..., :count].mT & (block != block[:, None])
    numbers = block.where(sees, count).sort(-1).values
    return _for_heads(heads, sees.sum(-1), numbers.clamp(max=count - 1))


def _for_heads(heads: int, counts: torch.Tensor, numbers: torch.Tensor) -> Lists:
    each, count = heads // len(counts), counts.shape[1]
    counts, numbers = (x.to(torch.int32).repeat_interleave(each, 0)[None].contiguous() for x in (counts, numbers))
    own = torch.arange(count, dtype=torch.int32, device=counts.device).expand(1, heads, count).contiguous()
    return torch.ones_like(counts), own[..., None], counts, numbers


class _AttendSeen(torch.autograd.Function):
    """(1, N, H, D), (1, N, H_kv, D), seen (H_kv, blocks, width), sinks (H,) or None -> (1, N, H, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seen: torch.Tensor,
        sinks: torch.Tensor | None,
        scaling: float,
    ):
        heads = q.shape[2]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = q.new_empty(1, heads, q.shape[1], dtype=torch.float32)
        lists = _lists(*key_blocks(seen, heads))
        more = dict(softmax_scale=scaling, causal=True, out=out, lse=lse, pack_gqa=False)
        _interface()._flash_attn_fwd(q, k, v, block_sparse_tensors=lists, **more)
        if sinks is not None:
            add_sinks_(out[0], lse[0], sinks)
        ctx.save_for_backward(q, k, v, out, lse, seen, sinks)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor):
        q, k, v, out, lse, seen, sinks = ctx.saved_tensors
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        lists = _lists(*query_blocks(seen, q.shape[2]))
        more = dict(softmax_scale=ctx.scaling, causal=True, dq=dq, dk=dk, dv=dv)
        _interface()._flash_attn_bwd(q, k, v, out, dout.contiguous(), lse, block_sparse_tensors=lists, **more)
        is_trained = sinks is not None and ctx.needs_input_grad[4]
        dsinks = gradient_of_sinks(dout[0], out[0], lse[0], sinks) if is_trained else None
        return dq, dk, dv, None, dsinks, None


def _interface() -> Any:
    return KERNELS["flash_attention_4"].load()


def _lists(*lists: torch.Tensor) -> Any:
    return import_module(LISTS).BlockSparseTensorsTorch(*lists, block_size=(BLOCK, BLOCK))


class FlashBlocks(Launched):
    """FlashAttention-4 as a backend, also for "adaptive"."""

    def lacks(self, needs: Needs) -> str | None:
        """As `Backend.lacks`."""
        if not needs.blocks:
            return super().lacks(needs)
        if needs.blocks != "adaptive":
            return f"it sees whole blocks of keys, and those of {needs.blocks!r} end inside one"
        if torch.cuda.get_device_capability(needs.device)[0] != 9:
            return "its lists of blocks of 128 are for Hopper"
        if max(needs.dim, needs.value_dim) > 128 or needs.dim != needs.value_dim:
            return f"with lists of blocks its head dims are equal and at most 128, not {needs.dim}, {needs.value_dim}"
        if needs.softcap:
            return f"it is called with lists of blocks without softcap, and softcap={needs.softcap} was asked for"
        if is_deterministic() and needs.requires_grad:
            return "its backward with lists of blocks is not deterministic"
        return self.kernel.lacks(needs)

    def attend_blocks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, options: Options
    ) -> torch.Tensor:
        """As `Backend.attend_blocks`."""
        q, k, v = (plan.arrange(x) for x in (query, key, value))
        seen = plan.find_seen(q, k)
        # (H, N, D) -> (1, N, H, D), a view
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = _AttendSeen.apply(q, k, v, seen, options.sinks, options.scale(query.shape[-1]))
        return plan.restore(out[0].transpose(0, 1))

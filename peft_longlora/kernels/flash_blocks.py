"""FlashAttention-4 on blocks of keys that are chosen by content, from lists of blocks, on Hopper.

Its forward reads for each block of queries the blocks of keys that it sees, and its backward reads for each block of
keys the blocks of queries that see it. All but a block's own lie wholly before it, so causality is the only mask.
Both are operators, as in `operators`: so kept attention is kept here too, and torch.compile takes them as they are.
"""

from __future__ import annotations

from typing import Any, Optional

import torch

from peft_longlora.kernels.blocks import BLOCK, BlockPlan
from peft_longlora.kernels.flash import import_module
from peft_longlora.kernels.kernel import Needs, Options, is_deterministic
from peft_longlora.kernels.operators import KERNELS, Launched, empty_gradients
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


@torch.library.custom_op("peft_longlora::attend_seen", mutates_args=())
def attend_seen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scaling: float,
    sinks: Optional[torch.Tensor] = None,  # noqa: UP045 (torch 2.11 reads no `|` here)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention to the blocks of keys that each block of queries sees.

    Args:
        q: (N, H, D). k, v: (N, H_kv, D). N counts places in blocks.
        seen: as in `key_blocks`. scaling: factor on the scores. sinks: (H,), counted in every softmax.

    Returns: (N, H, D), and the log-sum-exp of the scores, (H, N) float32.
    """
    out, lse = _outputs(q)
    lists = _lists(*key_blocks(seen, q.shape[1]))
    more = dict(softmax_scale=scaling, causal=True, out=out[None], lse=lse[None], pack_gqa=False)
    _interface()._flash_attn_fwd(q[None], k[None], v[None], block_sparse_tensors=lists, **more)
    if sinks is not None:
        add_sinks_(out, lse, sinks)
    return out, lse


@attend_seen.register_fake
def _(q, k, v, seen, scaling, sinks=None):
    return _outputs(q)


def _outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("peft_longlora::attend_seen_backward", mutates_args=())
def attend_seen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seen: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    grads = empty_gradients(q, k, v)
    lists = _lists(*query_blocks(seen, q.shape[1]))
    tensors = (x[None] for x in (q, k, v, out, dout.contiguous(), lse))
    dq, dk, dv = (x[None] for x in grads)
    more = dict(softmax_scale=scaling, causal=True, dq=dq, dk=dk, dv=dv)
    _interface()._flash_attn_bwd(*tensors, block_sparse_tensors=lists, **more)
    return grads


@attend_seen_backward.register_fake
def _(dout, q, k, v, out, lse, seen, scaling):
    return empty_gradients(q, k, v)


def _save(ctx, inputs, output):
    q, k, v, seen, ctx.scaling, sinks = inputs
    ctx.save_for_backward(q, k, v, *output, seen, sinks)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    if dout is None:
        return (None,) * 6
    *tensors, sinks = ctx.saved_tensors
    grads = attend_seen_backward(dout, *tensors, ctx.scaling)
    _, _, _, out, lse, _ = tensors
    is_trained = sinks is not None and ctx.needs_input_grad[-1]
    return *grads, None, None, gradient_of_sinks(dout, out, lse, sinks) if is_trained else None


attend_seen.register_autograd(_backward, setup_context=_save)


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
        # (H, N, D) -> (N, H, D), a view
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out, _ = attend_seen(q, k, v, seen, options.scale(query.shape[-1]), options.sinks)
        return plan.restore(out.transpose(0, 1))

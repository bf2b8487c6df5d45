"""S2-Attn through FlexAttention: Triton kernels that PyTorch compiles, with a block mask made from the boundaries.

It is the slowest to start, and the only backend that can do softcap if no flash kernel is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from peft_longlora.kernels.blocks import BLOCK, BlockPlan
from peft_longlora.kernels.cuts import Cuts
from peft_longlora.kernels.groups import Groups, split_heads
from peft_longlora.kernels.kernel import Backend, Needs, Options

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Flex(Backend):
    """FlexAttention. On a GPU it is compiled; on a CPU its plain version runs, forward only, for tests."""

    name = "flex"

    def lacks(self, needs: Needs) -> str | None:
        """As `Backend.lacks`."""
        if needs.dropout:
            return f"it has no dropout, and dropout={needs.dropout} was asked for"
        if needs.device.type != "cuda" and needs.requires_grad:
            return f"it has no backward on {needs.device.type!r}"
        if needs.device.type == "cuda" and min(needs.dim, needs.value_dim) < 16:
            return f"its head dim is at least 16, not {min(needs.dim, needs.value_dim)}"
        return None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cuts: Cuts, options: Options
    ) -> torch.Tensor:
        """As `Backend.attend`."""
        batch, heads, length, _ = query.shape
        kv_heads, groups, window = key.shape[1], cuts.groups(), cuts.window
        # (B, H, S, D) -> (1, H, B * S, D); a view if B is 1
        q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
        is_token = None
        if groups.padding is not None:  # a weight of 0 times NaN is NaN
            is_token = groups.once(("flex tokens", q.device), lambda: ~groups.padding.to(q.device).view(1, 1, -1, 1))
            q, k, v = (x.where(is_token, 0) for x in (q, k, v))
        if not groups.is_split:
            halves = [("straight", q, k, v, options.sinks)]
        else:
            h, h_kv = split_heads(heads, kv_heads)
            queries = q.split((h, heads - h), dim=1)
            keys, values = (x.split((h_kv, kv_heads - h_kv), dim=1) if h_kv else (x, x) for x in (k, v))
            sinks = (None, None) if options.sinks is None else options.sinks.split((h, heads - h))
            every = zip(("straight", "shifted"), queries, keys, values, sinks, strict=True)
            halves = [half for half in every if half[1].shape[1]]
        score_mod = _score_mod(groups, options, query)

        def mask_of(half: str) -> BlockMask:
            made = "flex", half, window, query.device
            return groups.once(made, lambda: block_mask(groups, half, query.device, window))

        outputs = [_call(*tensors, score_mod, mask_of(half), sinks) for half, *tensors, sinks in halves]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if is_token is not None:
            out = out.where(is_token, 0)  # so that its gradient is 0 too
        return out.transpose(1, 2).view(batch, length, heads, -1)

    def attend_blocks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, options: Options
    ) -> torch.Tensor:
        """As `Backend.attend_blocks`."""
        q, k, v = (plan.arrange(x) for x in (query, key, value))
        mask = _mask_of_seen(plan, plan.find_seen(q, k), len(q))
        out = _call(q[None], k[None], v[None], _score_mod(plan, options, q), mask, options.sinks)
        return plan.restore(out[0])


@cache
def _flex_attention(is_compiled: bool) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    # dynamic: one compilation for all lengths. fullgraph: if compiling fails, an error instead of S x S scores. On a
    # CPU the plain version runs, for tests.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True) if is_compiled else flex_attention


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable | None,
    mask: BlockMask,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """(1, H, N, D), (1, H_kv, N, D) -> (1, H, N, D_v)."""
    found = _flex_attention(query.device.type == "cuda")(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=mask,
        enable_gqa=query.shape[1] != key.shape[1],
        # the kernel for few queries behind a cache has no tiles for blocks of 128 queries
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        **({} if sinks is None else {"return_lse": True}),
    )
    if sinks is None:
        return found
    out, lse = found
    return out * torch.sigmoid(lse - sinks[:, None]).unsqueeze(-1).to(out.dtype)  # see `sinks`


def _score_mod(plan: Groups | BlockPlan, options: Options, query: torch.Tensor) -> Callable | None:
    """The change of scores that were scaled by D ** -0.5, or None if there is none; made once for a plan.

    Numbers are given as tensors: torch.compile with dynamic shapes turns a number into something FlexAttention refuses.
    """
    dim, device, softcap = query.shape[-1], query.device, options.softcap or 0.0
    factor = options.scale(dim) * dim**0.5

    def make() -> Callable | None:
        scale, cap = (torch.tensor(x, dtype=torch.float32, device=device) for x in (factor, softcap))

        def soften(score, b, h, q, k):
            return cap * torch.tanh(score * scale / cap)

        def rescale(score, b, h, q, k):
            return score * scale

        if softcap:
            return soften
        return None if abs(factor - 1) < 1e-6 else rescale

    return plan.once(("score_mod", round(factor, 6), softcap, device), make)


def block_mask(groups: Groups, half: str, device: torch.device, window: int = 0) -> BlockMask:
    """The BlockMask of one half, from its boundaries: memory is O((S / 128)^2), not O(S^2)."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens = groups.batch * groups.length
    boundaries = getattr(groups, half)
    pieces = list(pairwise(boundaries))
    # A token sees its piece from the start, or from the window's, up to itself. Padding, and tokens before the first
    # piece, see nothing.
    first = [tokens, *(tokens if start in groups.padding_starts else start for start, _ in pieces)]
    lengths = torch.tensor([boundaries[0], *(end - start for start, end in pieces)])
    start = torch.repeat_interleave(torch.tensor(first), lengths).to(device)
    if window:
        start = torch.maximum(start, torch.arange(tokens, device=device) - window + 1)
    blocks = -(-tokens // BLOCK)
    padded = torch.nn.functional.pad(start, (0, blocks * BLOCK - tokens), value=tokens).view(blocks, BLOCK)
    q, kv = torch.arange(blocks, device=device)[:, None], torch.arange(blocks, device=device)
    some = (kv <= q) & ((kv + 1) * BLOCK > padded.amin(1)[:, None])
    full = (kv < q) & (kv * BLOCK >= padded.amax(1)[:, None])

    def sees(b, h, q, k):
        return (k <= q) & (k >= start[q])

    def listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    partial_blocks, full_blocks = listed(some & ~full), listed(full)
    return BlockMask.from_kv_blocks(
        *partial_blocks, *full_blocks, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )


def _mask_of_seen(plan: BlockPlan, seen: torch.Tensor, heads: int):
    """The BlockMask of lists of blocks (H_kv or 1, blocks, width), for H heads."""
    from torch.nn.attention.flex_attention import BlockMask

    layout, count, device = plan.layout(seen.device), seen.shape[1], seen.device
    block = torch.arange(count, device=device)[:, None]
    # Of these every query sees every key; of the block's own, and at the end of a window, some.
    whole = (seen < block) & (seen < count)
    if plan.pattern == "window":
        is_inside = (block - seen + 1) * BLOCK <= plan.group_size // 2
        whole &= is_inside | (seen == layout.first[:, None]) | layout.is_dense[:, None]

    def listed(is_in: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.zeros(len(seen), count, count, dtype=torch.int32, device=device)
        numbers[..., : seen.shape[2]] = seen.where(is_in, count).sort(-1).values.clamp(max=count - 1)
        counts = is_in.sum(-1, dtype=torch.int32)
        return counts.repeat_interleave(each, 0)[None], numbers.repeat_interleave(each, 0)[None]

    each = heads // len(seen)
    table = torch.zeros(len(seen), count, count + 1, dtype=torch.bool, device=device).scatter_(2, seen, True)

    def sees(b, h, q, k):
        return table[h // each, q // BLOCK, k // BLOCK] & plan.may_see(q, k, layout)

    return BlockMask.from_kv_blocks(
        *listed(~whole & (seen < count)),
        *listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(count * BLOCK, count * BLOCK),
    )

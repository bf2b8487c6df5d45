"""S2-Attn through PyTorch's scaled_dot_product_attention: it works on every device, and does not copy q, k, v.

Neighbouring groups of equal length become one batched call on views. Heads and tokens are cut by `split`,
whose backward is one concatenation, rather than by slices, whose backward is a zero-fill and an add a slice. Sinks and
sliding windows are exact here too, but cost copies (`sdpa_call`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from peft_longlora.kernels.blocks import BLOCK, BlockPlan
from peft_longlora.kernels.cuts import Cuts
from peft_longlora.kernels.groups import Groups, runs_of_equal_pieces, split_heads
from peft_longlora.kernels.kernel import Backend, Needs, Options, connect
from peft_longlora.kernels.sdpa_call import attend_masked, attend_piece

# Without cuDNN, which is its own backend here. PyTorch 2.11 finds cuDNN's backward plans by the strides of q, k and v
# only. The gradient of the output is a cut of a larger tensor here; if its strides change, the plan runs with the wrong
# ones.
CHOICES = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# Queries x keys of one call, if each block of queries sees keys of its own: bounds the mask and the gathered keys.
MOST_SCORES = 2**25


class Sdpa(Backend):
    """PyTorch's scaled_dot_product_attention: everywhere, without a softcap."""

    name = "sdpa"

    def lacks(self, needs: Needs) -> str | None:
        """As `Backend.lacks`."""
        return "it has no softcap" if needs.softcap else None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cuts: Cuts, options: Options
    ) -> torch.Tensor:
        """As `Backend.attend`."""
        batch, heads, length, _ = query.shape
        how = cuts.groups(), options, cuts.window
        strips = [_attend_strip(*rows, *how) for rows in _token_rows(query, key, value)]
        out = (strips[0] if len(strips) == 1 else torch.cat(strips)).view(batch, length, heads, value.shape[-1])
        # Padding is not computed, so a batch of only padding would give q, k, v no gradient instead of zeros.
        is_trained = any(x.requires_grad for x in (query, key, value))
        return connect(out, query, key, value) if is_trained and not out.requires_grad else out

    def attend_blocks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, options: Options
    ) -> torch.Tensor:
        """As `Backend.attend_blocks`: keys are gathered for some blocks of queries at a time, and again in the
        backward."""
        q, k, v = (plan.arrange(x) for x in (query, key, value))
        seen, kv_heads = plan.find_seen(q, k), k.shape[0]
        count, width = seen.shape[1:]
        step = max(1, MOST_SCORES // (BLOCK * BLOCK * width))
        heads = []
        sinks = [None] * kv_heads if options.sinks is None else options.sinks.unflatten(0, (kv_heads, -1)).unbind(0)
        for kv_head, queries in enumerate(q.unflatten(0, (kv_heads, -1)).unbind(0)):
            lists = seen[kv_head if len(seen) > 1 else 0]
            tensors = queries, k[kv_head], v[kv_head], replace(options, sinks=sinks[kv_head])
            parts = [
                checkpoint(_attend_chosen, plan, at, lists[at : at + step], *tensors, use_reentrant=False)
                for at in range(0, count, step)
            ]
            heads.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        return plan.restore(torch.cat(heads))


def _token_rows(*tensors: torch.Tensor) -> list[tuple[torch.Tensor | int, ...]]:
    """(first token, q, k, v) with q, k, v as (heads, tokens, D) views: one strip of B * S tokens, or one a row."""
    batch, _, length, _ = tensors[0].shape
    if batch == 1 or all(x.stride(0) == length * x.stride(2) for x in tensors):
        return [(0, *(x.transpose(0, 1).flatten(1, 2) for x in tensors))]
    # Unbound once: one backward node for all rows, not one zero-filled gradient of full size a row.
    rows = zip(*(x.unbind(0) for x in tensors), strict=True)
    return [(row * length, *strip) for row, strip in enumerate(rows)]


def _attend_strip(
    first: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: Groups,
    options: Options,
    window: int,
) -> torch.Tensor:
    """One strip of tokens: (H, N, D), (H_kv, N, D) -> (N, H, D_v)."""
    last = first + query.shape[1]

    def inside(boundaries: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(b for b in boundaries if first <= b <= last)

    def attend_half(boundaries: tuple[int, ...], sinks: torch.Tensor | None, *half: torch.Tensor) -> torch.Tensor:
        how = replace(options, sinks=sinks), window
        return _attend_pieces(first, *half, inside(boundaries), groups.padding_starts, *how)

    if not groups.is_split:
        return attend_half(groups.straight, options.sinks, query, key, value)
    heads, kv_heads = query.shape[0], key.shape[0]
    h, h_kv = split_heads(heads, kv_heads)
    queries = query.split((h, heads - h))
    keys, values = (x.split((h_kv, kv_heads - h_kv)) if h_kv else (x, x) for x in (key, value))
    sinks = (None, None) if options.sinks is None else options.sinks.split((h, heads - h))
    halves = zip((groups.straight, groups.shifted), sinks, queries, keys, values, strict=True)
    return torch.cat([attend_half(*half) for half in halves if half[2].shape[0]], dim=1)


def _attend_pieces(
    first: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: tuple[int, ...],
    padding_starts: frozenset[int],
    options: Options,
    window: int,
) -> torch.Tensor:
    """One half of the heads: (h, N, D) -> (N, h, D_v), one batched call a run of equal pieces."""
    runs = runs_of_equal_pieces(boundaries, padding_starts)
    sizes, is_padding, at = [], [], first
    for start, piece, count in [*runs, (first + query.shape[1], 0, 0)]:
        if start > at:
            sizes, is_padding = [*sizes, start - at], [*is_padding, True]
        if count:
            sizes, is_padding = [*sizes, piece * count], [*is_padding, False]
        at = start + piece * count
    pieces = iter(piece for _, piece, _ in runs)
    outputs = []
    for q, k, v, empty in zip(*(x.split(sizes, dim=1) for x in (query, key, value)), is_padding, strict=True):
        if empty:
            outputs.append(q.new_zeros(q.shape[1], q.shape[0], v.shape[-1]))
            continue
        piece = next(pieces)
        if piece == 1 and q.is_cuda:  # PyTorch 2.11's flash backward is wrong for one query if heads share a KV head
            k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
        # (h, count * piece, D) -> (count, h, piece, D), a view
        q, k, v = (x.unflatten(1, (-1, piece)).transpose(0, 1) for x in (q, k, v))
        with sdpa_kernel(CHOICES) if q.is_cuda else nullcontext():
            out = attend_piece(q, k, v, options, window)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_chosen(
    plan: BlockPlan,
    first: int,
    lists: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """Some blocks of queries from `first` on, of one KV head: (h, N, D), (N, D), (N, D_v) -> (h, n, D_v)."""
    number, count = len(lists), len(query[0]) // BLOCK
    layout, own = plan.layout(query.device), torch.arange(BLOCK, device=query.device)
    q_at = (torch.arange(first, first + number, device=query.device)[:, None] * BLOCK + own)[:, :, None]
    held = lists.clamp(max=count - 1)
    k_at = (held[:, :, None] * BLOCK + own).flatten(1)
    is_held = (lists < count).repeat_interleave(BLOCK, dim=1)[:, None]
    mask = (plan.may_see(q_at, k_at[:, None], layout) & is_held)[:, None]
    # (h, N, D) -> (blocks, h, 128, D), and the keys of each block, (blocks, h, keys, D)
    q = query.unflatten(1, (count, BLOCK))[:, first : first + number].transpose(0, 1)
    k, v = (x[k_at][:, None].expand(-1, len(query), -1, -1) for x in (key, value))
    return attend_masked(q, k, v, mask, options).transpose(0, 1).flatten(1, 2)

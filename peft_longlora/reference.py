"""The definition of correct: S2-Attn with a dense mask, in plain PyTorch and any floating dtype.

Tests compare every fast path with this file, outputs and gradients. It builds (S, S) masks and is meant for tests and
for reading, not for training. Only tests and benchmarks call it. It imports only torch.
"""

from __future__ import annotations

import torch


def group_ids(segment_ids: torch.Tensor, group_size: int, shift: int) -> torch.Tensor:
    """Number the groups of a row: tokens that share a number may see each other.

    Args:
        segment_ids: (B, S) int, 0 = padding, a run of one positive number = one document.
        group_size: G, tokens.
        shift: tokens by which the groups start later: the length of the first group; 0 if it is whole.

    Example: one document of 10 tokens, G = 4: shift 0 gives 0000111122, shift 2 gives 0011112222.
    """
    ids = torch.zeros_like(segment_ids)
    for row in range(segment_ids.shape[0]):
        values, lengths = torch.unique_consecutive(segment_ids[row], return_counts=True)
        start, group = 0, 1
        for value, length in zip(values.tolist(), lengths.tolist(), strict=True):
            position = torch.arange(length, device=ids.device)
            if value and length > group_size:
                position = (position + (group_size - shift) % group_size) // group_size
            else:  # padding, or a document that fits into one group and stays dense
                position = torch.zeros_like(position)
            ids[row, start : start + length] = position + group if value else 0
            start, group = start + length, group + int(position[-1]) + 1
    return ids


def head_shifts(heads: int, kv_heads: int, group_size: int, pattern: str) -> torch.Tensor:
    """(H,) the shift of each query head: 0 for those of the first half of the KV heads.

    A single KV head is read by both halves; then the second half of the query heads is shifted.
    """
    straight = heads // 2 if kv_heads == 1 else kv_heads // 2 * (heads // kv_heads)
    shift = {"s2": group_size // 2}.get(pattern, 0)
    return torch.tensor([0] * straight + [shift] * (heads - straight))


def seen_by_blocks(
    query: torch.Tensor, key: torch.Tensor, same: torch.Tensor, group_size: int, pattern: str, chosen: int | None
) -> torch.Tensor:
    """The keys that the queries of one KV head see with "window" or "adaptive": (S, S) bool, to combine with causality.

    Args:
        query: (h, S, D), the query heads of a KV head. key: (S, D).
        same: (S, S) bool: query and key are in one document, and the key is not later.
        group_size: G, tokens. chosen: the number of blocks that are chosen by content.
    """
    chosen, seen = max(1, group_size // 256 - 3) if chosen is None else chosen, torch.zeros_like(same)
    for begin in [i for i in range(len(same)) if same[i, i] and not (i and same[i, i - 1])]:
        end = begin + int(same[:, begin].sum())
        blocks = [slice(i, min(i + 128, end)) for i in range(begin, end, 128)]
        for number, block in enumerate(blocks):
            if end - begin <= group_size:  # a short document stays dense
                seen[block, begin:end] = True
            elif pattern == "window":
                for i in range(block.start, block.stop):
                    seen[i, max(begin, i - group_size // 2 + 1) : i + 1] = True
                seen[block, begin : begin + 128] = True
            else:
                asks = query[:, max(begin, block.start - 127) : block.start + 1].mean((0, 1))  # no later query
                others = list(range(1, number - 1))
                others.sort(key=lambda j: -(asks @ key[blocks[j]].mean(0)).item())
                for j in {0, max(number - 1, 0), number, *others[:chosen]}:
                    seen[block, blocks[j]] = True
    return seen


def s2_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group_size: int,
    *,
    segment_ids: torch.Tensor | None = None,
    pattern: str = "s2",
    chosen_blocks: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """S2-Attn by its definition (LongLoRA, arXiv:2309.12307, section 3.2; groups as in the original's flash path).

    Args:
        query: (B, H, S, D), any floating dtype, float64 included.
        key: (B, H_kv, S, D).
        value: (B, H_kv, S, D_v).
        group_size: G, tokens. This and the rest are as in `peft_longlora.s2_attention`.
        segment_ids: (B, S) int: 0 = padding, a run of one positive number = one document.
        pattern: "s2", "local", "full", "window" or "adaptive".
        chosen_blocks: how many blocks "adaptive" chooses.
        scaling: factor on the scores; None for D ** -0.5.
        dropout: follows torch's random generator, so it equals a fast path only in distribution.
        sinks: (H,) learned logits that every softmax counts, without a value.
        window: with pattern="full" only: a query sees so many keys of its document; None for all.

    Returns:
        (B, S, H, D_v), dtype of query; exactly 0 at padding.
    """
    (batch, heads, length, dim), kv_heads = query.shape, key.shape[1]
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    if segment_ids is None:
        segment_ids = torch.ones(batch, length, dtype=torch.long, device=query.device)
    g, has_blocks = length if pattern == "full" else group_size, pattern in ("window", "adaptive")
    shifts = head_shifts(heads, kv_heads, g, pattern)
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool, device=query.device)
    for shift in shifts.unique().tolist() if length else ():
        ids = group_ids(segment_ids, length if has_blocks else g, shift)
        same = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, :, None] & causal
        mask[:, shifts == shift] = same[:, None]
    if has_blocks:
        for row, one in ((row, one) for row in range(batch) for one in range(kv_heads)):
            own, same = slice(one * heads // kv_heads, (one + 1) * heads // kv_heads), mask[row, 0].clone()
            mask[row, own] &= seen_by_blocks(query[row, own], key[row, own.start], same, g, pattern, chosen_blocks)
    if window is not None:
        mask = mask & torch.ones_like(causal).triu(1 - window)
    scores = query @ key.transpose(-1, -2) * (dim**-0.5 if scaling is None else scaling)
    scores = scores.masked_fill(~mask, float("-inf"))
    # A padding row has no key. Softmax would give NaN, but the definition says 0.
    scores = scores.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    if sinks is not None:  # a logit of each head, whose weight has no value
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., :length].masked_fill(~mask, 0.0)
    return (torch.nn.functional.dropout(weights, dropout) @ value).transpose(1, 2)

"""How much attention a training run computes beside full attention, in pairs of a query and a key, by arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from peft_longlora.kernels.blocks import BLOCK, default_blocks


def causal_pairs(length: int) -> int:
    """Pairs of full causal attention. Example: 3 tokens see 1 + 2 + 3 = 6."""
    return length * (length + 1) // 2


def grouped_pairs(length: int, group_size: int, shift: int = 0) -> int:
    """Pairs inside groups; with `shift`, the length of a first short group.

    Example: 10 tokens, G = 4: groups of 4, 4 and 2 have 10 + 10 + 3 pairs; with shift 2, groups of 2, 4 and 4.
    """
    if length <= group_size:
        return causal_pairs(length)
    whole, rest = divmod(length - shift, group_size)
    return causal_pairs(shift) + whole * causal_pairs(group_size) + causal_pairs(rest)


def window_pairs(length: int, window: int) -> int:
    """Pairs of a sliding window, sinks not counted: each token sees itself and the `window` - 1 before it."""
    window = min(window, length)
    return causal_pairs(window) + (length - window) * window


def adaptive_pairs(length: int, chosen: int) -> int:
    """Pairs of "adaptive": a block of queries sees its own, the one before, the first and `chosen` others, if there.

    Example: 3 blocks of 128, none chosen: 0 + 1 + 2 whole blocks and three triangles.
    """
    blocks, rest = divmod(length, BLOCK)
    before = sum(min(block, chosen + 2) for block in range(blocks)) * BLOCK * BLOCK
    return before + blocks * causal_pairs(BLOCK) + min(blocks, chosen + 2) * BLOCK * rest + causal_pairs(rest)


def layer_share(
    pattern: str, length: int, group_size: int, heads: int, kv_heads: int, chosen: int | None = None
) -> float:
    """Share of full attention's pairs in one sparse layer.

    Args:
        chosen: blocks that "adaptive" chooses; None for its default.

    Raises: ValueError: an unknown pattern.
    """
    whole = causal_pairs(length)
    if pattern == "full":
        return 1.0
    if pattern == "local":
        return grouped_pairs(length, group_size) / whole
    if pattern == "adaptive":
        return adaptive_pairs(length, default_blocks(group_size) if chosen is None else chosen) / whole
    if pattern == "window":
        return window_pairs(length, group_size // 2) / whole
    if pattern == "s2":  # KV heads from kv_heads // 2 on are shifted, with their query heads
        straight = kv_heads // 2 * (heads // kv_heads) if kv_heads > 1 else heads // 2
        shifted = grouped_pairs(length, group_size, group_size // 2)
        return (straight * grouped_pairs(length, group_size) + (heads - straight) * shifted) / heads / whole
    raise ValueError(f"pattern={pattern!r}: nobody has counted its pairs. Add it to work.py.")


def dense_step_numbers(steps: int, dense_every: int | None, schedule: dict[str, int] | None) -> set[int]:
    """Which training steps, counted from 0, are dense in every layer.

    Args:
        dense_every: the last of every n steps, or None.
        schedule: None for none, or some of {"first": n}, {"last": n} and {"every": n}; with "after": k the counting of
            "every" begins after k steps.

    Example: 12 steps, {"every": 3, "after": 6}: steps 8 and 11.
    """
    schedule = schedule or {}
    after = schedule.get("after", 0)
    found = set(range(dense_every - 1, steps, dense_every)) if dense_every else set()
    if every := schedule.get("every"):
        found |= set(range(after + every - 1, steps, every))
    found |= set(range(min(steps, schedule.get("first", 0))))
    return found | set(range(max(0, steps - schedule.get("last", 0)), steps))


def attention_share(lengths: Sequence[int], shares: Sequence[float], rows: Sequence[int] | None = None) -> float:
    """Share of full attention's pairs, over all training forwards.

    Args:
        lengths: tokens of each forward. shares: of full attention's pairs that each forward computes.
        rows: tokens of each row, where a row is cut into several forwards.
    """
    return sum(map(operator.mul, map(causal_pairs, lengths), shares)) / sum(map(causal_pairs, rows or lengths))


def shape_of(config: Any) -> tuple[int, int, int]:
    """(layers, heads, KV heads) of a transformers config."""
    return config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads

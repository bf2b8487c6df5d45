"""`s2_attention`, and `attend`, which every sparse layer calls. Both check a call and pass it to a backend."""

from __future__ import annotations

from functools import partial

import torch

from peft_longlora.kernels.backends import check_backend, pick_backend
from peft_longlora.kernels.blocks import BlockPlan
from peft_longlora.kernels.cuts import Cuts, find_groups, plan_tensors
from peft_longlora.kernels.groups import find_documents
from peft_longlora.kernels.kernel import Options, zero_output
from peft_longlora.kernels.patterns import BLOCK_PATTERNS, check_blocks, check_pattern, whole_number

DEFAULTS = Options()


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cuts: Cuts, options: Options = DEFAULTS
) -> torch.Tensor:
    """Causal attention inside the groups: (B, H, S, D), (B, H_kv, S, D) -> (B, S, H, D_v), 0 at padding.

    Raises:
        ValueError: the tensors do not fit together, or the backend is unknown or not available.
        NotImplementedError: the backend cannot run this call.
    """
    query, key, value = checked(query, key, value, options)
    batch, _, length, _ = query.shape
    if (cuts.batch, cuts.length) != (batch, length):
        raise ValueError(f"The plan is for {(cuts.batch, cuts.length)} (B, S), the query has {(batch, length)}.")
    if not query.numel() or not value.numel():
        return zero_output(query, key, value)
    if cuts.blocks is not None:
        return _attend_blocks(query, key, value, cuts.blocks, options)
    backend = pick_backend(query, key, value, cuts.is_regular, options, has_window=bool(cuts.window))
    return backend.attend(query, key, value, cuts, options)


@torch.compiler.disable(reason="a pattern that sees blocks of keys compiles its own kernel: use fullgraph=False")
def _attend_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, options: Options
) -> torch.Tensor:
    if not plan.documents:  # only padding
        return zero_output(query, key, value)
    backend = pick_backend(query, key, value, True, options, plan.pattern)
    return backend.attend_blocks(query, key, value, plan, options)


def checked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The checked tensors, in autocast's dtype.

    Raises: ValueError: an unknown backend, a dropout outside [0, 1], or tensors that do not fit together.
    """
    check_backend(options.backend)
    if not 0 <= options.dropout <= 1:
        raise ValueError(f"dropout={options.dropout!r} is outside [0, 1]: it is the probability of dropping a weight.")
    check_tensors(query, key, value)
    if options.sinks is not None and tuple(options.sinks.shape) != (query.shape[1],):
        raise ValueError(f"sinks has shape {tuple(options.sinks.shape)}: it must be (H,), ({query.shape[1]},).")
    kind = query.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value are {query.dtype}, {key.dtype}, {value.dtype}: use one dtype.")
    return query, key, value


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse tensors that do not fit together. Raises: ValueError."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if any(x.dim() != 4 for x in (query, key, value)):
        raise ValueError(f"{shapes}: each must have 4 dimensions, (B, H, S, D).")
    batch, heads, length, dim = query.shape
    if key.shape[:3] != value.shape[:3] or (key.shape[0], key.shape[2], key.shape[3]) != (batch, length, dim):
        raise ValueError(
            f"{shapes}: key and value must be (B, H_kv, S, D) with the B, S and D of query; only value may differ in "
            f"D. S2-Attn is for whole sequences: attend densely if a cache makes keys longer than queries."
        )
    if not key.shape[1] or heads % key.shape[1]:
        raise ValueError(f"{shapes}: {heads} query heads cannot be divided evenly among {key.shape[1]} KV heads.")
    if len({x.device for x in (query, key, value)}) > 1:
        raise ValueError(f"query, key and value are on {query.device}, {key.device} and {value.device}: move them.")
    if not all(x.is_floating_point() for x in (query, key, value)):
        raise ValueError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}: use floating point.")


def s2_attention(
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
    backend: str | None = None,
) -> torch.Tensor:
    """Shifted sparse attention: causal attention inside groups; for half of the heads the groups start half a group
    later.

    Args:
        query: (B, H, S, D) floating point.
        key: (B, H_kv, S, D), H divisible by H_kv.
        value: (B, H_kv, S, D_v); D_v may differ from D.
        group_size: G, tokens; even, 2 or more. A document of at most G tokens is attended to densely.
        segment_ids: (B, S) int: 0 = padding, a run of one positive number = one document. None: each row is a document.
        pattern: "s2"; "local" (no head is shifted); "full" (dense inside each document). In documents of more than G
            tokens also: "window" (each query sees G / 2 tokens and the first 128 of its document); "adaptive" (each
            block of 128 queries sees its own block of keys, the one before, the first of its document, and those whose
            mean key scores highest with the mean of the 128 queries up to the block's first; per KV head).
        chosen_blocks: how many blocks "adaptive" chooses; None for as many as cost what S2-Attn costs, 1 at
            least, which costs more if G is below 1024.
        scaling: factor on the scores; None for D ** -0.5.
        dropout: probability at which attention weights are dropped.
        sinks: (H,) learned logits that every softmax counts, without a value (gpt_oss).
        window: with pattern="full" only: a query sees so many keys of its document, itself included; None for all.
        backend: one of `backends.BACKENDS`; None for the fastest.

    Returns:
        (B, S, H, D_v), dtype of query; exactly 0 at padding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an odd or too small group_size, a dropout
            outside [0, 1], an unknown pattern or backend.

    Source: LongLoRA, arXiv:2309.12307, section 3.2; the groups are those of the original's flash path, which never
    wrap around, so that no token sees a later one. "adaptive" follows MoBA, arXiv:2502.13189.

    Example: 10 tokens, G = 4: straight heads [0,4) [4,8) [8,10); shifted heads [0,2) [2,6) [6,10).
    """
    group_size = check_pattern(group_size, pattern)
    check_tensors(query, key, value)
    batch, _, length, _ = query.shape
    if segment_ids is not None:
        _check_segment_ids(segment_ids, batch, length)
    if window is not None and (pattern != "full" or (whole_number(window) or 0) < 1):
        raise ValueError(f"window={window!r}, pattern={pattern!r}: a window is 1 token or more, and needs 'full'.")
    where = segment_ids, batch, length, group_size, pattern
    if pattern in BLOCK_PATTERNS:
        documents = _documents(segment_ids, batch, length)
        chosen_blocks = check_blocks(chosen_blocks)
        cuts = Cuts.by_blocks(BlockPlan.of(batch, length, documents, group_size, pattern, chosen_blocks))
    else:
        cuts = Cuts(batch, length, partial(find_groups, *where), partial(plan_tensors, *where, query.device))
        cuts.window = 0 if window is None or window >= length else int(window)
    return attend(query, key, value, cuts, Options(scaling, dropout, sinks=sinks, backend=backend))


@torch.compiler.disable
def _documents(segment_ids: torch.Tensor | None, batch: int, length: int) -> list[tuple[int, int, int]]:
    if segment_ids is None:
        return [(row * length, length, 1) for row in range(batch)]
    return find_documents(segment_ids) if segment_ids.numel() else []


def _check_segment_ids(segment_ids: torch.Tensor, batch: int, length: int) -> None:
    if tuple(segment_ids.shape) != (batch, length):
        raise ValueError(f"segment_ids has shape {tuple(segment_ids.shape)}: it must be (B, S) = {(batch, length)}.")
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise ValueError(f"segment_ids is {segment_ids.dtype}: it must hold integers, 0 at padding.")

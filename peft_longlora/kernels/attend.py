"""`s2_attention`: its checks, and the call of the backend that runs it.

Called by `attention` with a plan made once a forward, and by users with segment ids.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from peft_longlora.kernels import flex, sdpa
from peft_longlora.kernels.backends import KERNELS, check_backend, pick_backend
from peft_longlora.kernels.cuts import plan, regular_groups
from peft_longlora.kernels.groups import Groups, check_pattern, plan_from_segment_ids
from peft_longlora.kernels.operators import attend_halves


def check_dropout(dropout: float) -> None:
    """Refuse a dropout that is no probability. Raises: ValueError."""
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout={dropout!r} is outside [0, 1]: it is the probability of dropping a weight.")


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse tensors that do not fit together. Raises: ValueError."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if any(x.dim() != 4 for x in (query, key, value)):
        raise ValueError(f"{shapes}: each must have 4 dimensions, (B, H, S, D).")
    batch, heads, length, dim = query.shape
    if key.shape[:3] != value.shape[:3] or (key.shape[0], key.shape[2], key.shape[3]) != (batch, length, dim):
        raise ValueError(
            f"{shapes}: key and value must be (B, H_kv, S, D) with the B, S and D of query; only value may differ in "
            f"D. S2-Attn is for whole sequences: attend densely where a cache makes keys longer than queries."
        )
    if not key.shape[1] or heads % key.shape[1]:
        raise ValueError(f"{shapes}: {heads} query heads cannot be shared out to {key.shape[1]} KV heads evenly.")
    if len({x.device for x in (query, key, value)}) > 1:
        raise ValueError(f"query, key and value are on {query.device}, {key.device} and {value.device}: move them.")
    if not all(x.is_floating_point() for x in (query, key, value)):
        raise ValueError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}: use floating point.")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: Groups,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention by a ready plan: (B, H, S, D), (B, H_kv, S, D) -> (B, S, H, D_v).

    Args:
        softcap: scores become softcap * tanh(scores / softcap) (gemma2); None for none.
        sinks: (H,) learned logits that every softmax also sums over (gpt_oss); None for none.

    Raises:
        ValueError: tensors that do not fit together, or a backend that is unknown or not available.
        NotImplementedError: the backend cannot run this call.
    """
    check_backend(backend)
    check_dropout(dropout)
    check_tensors(query, key, value)
    device, batch, heads, length = query.device, *query.shape[:3]
    if (groups.batch, groups.length) != (batch, length):
        raise ValueError(f"The plan is for {(groups.batch, groups.length)} (B, S), the query has {(batch, length)}.")
    query, key, value = cast(query, key, value)
    if not query.numel() or not value.numel():
        return query.new_zeros(batch, length, heads, value.shape[-1]) + query.sum() + key.sum() + value.sum()
    softcap = softcap or 0.0
    name = pick_backend(query, key, value, groups.is_regular, dropout, backend, softcap, sinks is not None)
    if name == "sdpa":
        return sdpa.attend_groups(query, key, value, groups, scaling=scaling, dropout=dropout)
    if name == "flex":
        return flex.attend_flex(query, key, value, groups, scaling=scaling, softcap=softcap)
    return _attend_halves(query, key, value, *groups.tensors(device), scaling, softcap, name)


def cast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """To autocast's dtype, or an error if dtypes are mixed without it."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
    if len({x.dtype for x in tensors}) > 1:
        raise ValueError(f"query, key and value are {', '.join(str(x.dtype) for x in tensors)}: use one dtype.")
    return tensors


def _attend_halves(query, key, value, layout, cu_seqlens, scaling, softcap, name) -> torch.Tensor:
    batch, heads, length, dim = query.shape
    # (B, H, S, D) -> (B * S, H, D); a view of what a projection gives
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out, _ = attend_halves(q, k, v, layout, cu_seqlens, dim**-0.5 if scaling is None else scaling, softcap, name)
    return out.view(batch, length, heads, value.shape[3])


def attend_compiled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    make_plan: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """`attend` inside compiled code, where no number of tokens may be known: lengths then change without compiling.

    Args:
        make_plan: gives `Groups.tensors` by the operator `plan`, so that they are data to the compiler.

    Returns: (B, S, H, D_v), or None if the backend is "sdpa" or "flex", which are no operators of this package.
    """
    check_backend(backend)
    check_dropout(dropout)
    check_tensors(query, key, value)
    query, key, value = cast(query, key, value)
    name = pick_backend(query, key, value, False, dropout, backend, softcap or 0.0, sinks is not None)
    if name not in KERNELS:
        return None
    return _attend_halves(query, key, value, *make_plan(), scaling, softcap or 0.0, name)


def attend_causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Dense causal attention through the fastest kernel, which PyTorch's own choice is not on Hopper.

    Args:
        query: (B, H, S, D). key, value: (B, H_kv, T, D), T >= S: the last query sees every key (prefill, decoding).
        scaling, dropout, backend: as in `s2_attention`.

    Returns: (B, S, H, D_v).

    Raises: as `s2_attention`.
    """
    length, keys = query.shape[2], key.shape[2]
    if length == keys:
        groups = regular_groups(query.shape[0], length, 2, "full")
        return attend(query, key, value, groups, scaling=scaling, dropout=dropout, backend=backend)
    check_backend(backend)
    check_dropout(dropout)
    mask = None
    if length > 1:  # the lower right triangle of (S, T)
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2)


def s2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group_size: int,
    *,
    segment_ids: torch.Tensor | None = None,
    pattern: str = "s2",
    scaling: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Shifted sparse attention: causal attention inside groups, which half of the heads cut half a group later.

    Args:
        query: (B, H, S, D) floating point.
        key, value: (B, H_kv, S, D), H divisible by H_kv; value may have another last size.
        group_size: G, tokens; even, 2 or more. A document of at most G tokens is attended to densely.
        segment_ids: (B, S) int: 0 = padding, a run of one positive number = one document. None: each row is one.
        pattern: "s2"; "local" (no head is shifted); "full" (dense inside each document).
        scaling: factor on the scores; None for D ** -0.5.
        dropout: probability at which attention weights are dropped.
        backend: one of `backends.BACKENDS`; None for the fastest there is.

    Returns:
        (B, S, H, D), dtype of query; exactly 0 at padding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an odd or too small group_size, a dropout
            outside [0, 1], an unknown pattern or backend.

    Source: LongLoRA, arXiv:2309.12307, section 3.2; the groups are those of the original's flash path, which never
    wrap around, so that no token sees a later one.

    Example: 10 tokens, G = 4: straight heads [0,4) [4,8) [8,10); shifted heads [0,2) [2,6) [6,10).
    """
    check_pattern(group_size, pattern)
    check_tensors(query, key, value)
    batch, _, length, _ = query.shape
    if segment_ids is not None:
        _check_segment_ids(segment_ids, batch, length)
    if torch.compiler.is_compiling():
        make = partial(plan, segment_ids, batch, length, group_size, pattern, query.device)
        out = attend_compiled(query, key, value, make, scaling=scaling, dropout=dropout, backend=backend)
        if out is not None:
            return out
    if segment_ids is None:
        groups = regular_groups(batch, length, group_size, pattern)
    else:
        groups = plan_from_segment_ids(segment_ids, group_size, pattern)
    return attend(query, key, value, groups, scaling=scaling, dropout=dropout, backend=backend)


def _check_segment_ids(segment_ids: torch.Tensor, batch: int, length: int) -> None:
    if tuple(segment_ids.shape) != (batch, length):
        raise ValueError(f"segment_ids has shape {tuple(segment_ids.shape)}: it must be (B, S) = {(batch, length)}.")
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise ValueError(f"segment_ids is {segment_ids.dtype}: it must hold integers, 0 at padding.")

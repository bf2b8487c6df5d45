"""`s2_attention`, and the choice of the kernel that runs it.

Called by `attention` with a plan made once a forward, and by users with segment ids.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig

from peft_longlora import sdpa
from peft_longlora.groups import PATTERNS, Groups, plan_from_segment_ids, plan_groups

BACKENDS = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "cudnn", "sdpa", "flex")


def check_pattern(group_size: int, pattern: str) -> None:
    """Refuse a group size that cannot be shifted by half, and an unknown pattern.

    Raises: ValueError.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r} is unknown. Use one of {', '.join(map(repr, PATTERNS))}.")
    if not isinstance(group_size, int) or group_size < 2 or group_size % 2:
        raise ValueError(
            f"group_size={group_size!r} cannot be used: it must be an even number of tokens, 2 or more, because "
            f"shifted heads move their groups by half of it."
        )


def check_model(config: PreTrainedConfig, layers: Iterable[nn.Module], backend: str | None) -> None:
    """Refuse, before anything runs, a model whose attention needs what the backend cannot do.

    Raises: NotImplementedError.
    """
    _refuse("softcap", getattr(config, "attn_logit_softcapping", None) is not None)
    _refuse("attention sinks", any(hasattr(module, "sinks") for module in layers))


def _refuse(what: str, is_wanted: bool) -> None:
    if is_wanted:
        raise NotImplementedError(
            f"This model's attention has {what}, which the backend 'sdpa' cannot do. Use a backend that can, or "
            f"another model."
        )


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
        NotImplementedError: the backend cannot do softcap or sinks.
    """
    _refuse("softcap", softcap is not None)
    _refuse("attention sinks", sinks is not None)
    return sdpa.attend_groups(query, key, value, groups, scaling=scaling, dropout=dropout)


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
        backend: one of `BACKENDS`; None for the fastest there is.

    Returns:
        (B, S, H, D), dtype of query; exactly 0 at padding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an odd or too small group_size, an unknown
            pattern or backend.

    Source: LongLoRA, arXiv:2309.12307, section 3.2; the groups are those of the original's flash path, which never
    wrap around, so that no token sees a later one.

    Example: 10 tokens, G = 4: straight heads [0,4) [4,8) [8,10); shifted heads [0,2) [2,6) [6,10).
    """
    check_pattern(group_size, pattern)
    batch, _, length, _ = query.shape
    if segment_ids is None:
        groups = plan_groups(batch, length, group_size, pattern)
    else:
        groups = plan_from_segment_ids(segment_ids, group_size, pattern)
    return attend(query, key, value, groups, scaling=scaling, dropout=dropout, backend=backend)

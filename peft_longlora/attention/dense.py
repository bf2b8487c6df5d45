"""Dense attention: what the model would compute without this package."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_longlora.architecture import is_causal_layer
from peft_longlora.attention.mask import S2Mask
from peft_longlora.attention.settings import AttentionSettings
from peft_longlora.kernels import attend as kernels
from peft_longlora.kernels.groups import Groups


def _positions(settings: AttentionSettings, mask: S2Mask, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """(1 or B, S) positions that restart where a document starts, from cumulative lengths where they are given."""
    cu_seq_lens = settings.call.boundaries(kwargs)
    return settings.call.positions(kwargs) if cu_seq_lens is None else mask.positions(cu_seq_lens)


def _attend_densely(
    module: nn.Module,
    settings: AttentionSettings,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: S2Mask | torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the model would compute without this package, with the mask it would get; by another kernel if told to."""
    is_fastest = settings.is_fastest and settings.is_enabled
    if is_fastest and (groups := _whole_rows(module, query, key, mask, kwargs)) is not None:
        return kernels.attend(query, key, value, groups, scaling=scaling, dropout=dropout), None
    name = settings.dense_attention
    if isinstance(mask, S2Mask):
        mask = mask.dense(name, query.device, _positions(settings, mask, kwargs))
    if "flash" in name:
        return _flash(module, name, query, key, value, mask, dropout, scaling, **kwargs), None
    if name == "eager":
        # Every modeling file brings its own eager attention, and hands it over only where no other is set.
        attend = sys.modules[type(module).__module__].eager_attention_forward
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:  # a static cache's mask, made for sdpa
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    else:
        attend = ALL_ATTENTION_FUNCTIONS[name]
    return attend(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _whole_rows(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: S2Mask | torch.Tensor | None,
    kwargs: dict[str, Any],
) -> Groups | None:
    """The plan of a dense call that every kernel can do: whole rows, causal, nothing of the architecture's own."""
    own = ("sliding_window", "softcap", "s_aux")
    if not isinstance(mask, S2Mask) or query.shape[2] != key.shape[2] or any(kwargs.get(x) is not None for x in own):
        return None
    is_causal = is_causal_layer(module) and kwargs.get("is_causal") is not False
    return mask.whole_documents() if is_causal else None


def _flash(
    module: nn.Module,
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """A flash kernel by its transformers name.

    transformers' own wrapper is not called because it looks the kernel up by the model's implementation, which is
    "s2_attn" here (integrations/flash_attention.py).
    """
    return _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask,
        query_length=query.shape[2],
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        dropout=dropout,
        softmax_scale=scaling,
        softcap=softcap,
        s_aux=s_aux,
        attn_implementation=name,
        **kwargs,
    )

"""What transformers calls in every layer: sparse attention while training, the model's own attention otherwise.

transformers finds `s2_attention_forward` under the name "s2_attn" (register.py); what it does in a layer stands in that
layer's settings (settings.py).
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from peft_longlora import kernels, shared
from peft_longlora.groups import Groups, refuse_bidirectional
from peft_longlora.halves import plan
from peft_longlora.layers import is_causal_layer
from peft_longlora.mask import S2Mask
from peft_longlora.settings import AttentionSettings, settings_of

logger = logging.get_logger(__name__)


def s2_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: S2Mask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function for `attn_implementation="s2_attn"`.

    Args:
        module: the attention layer; `training`, `layer_idx` and its settings are read.
        query: (B, H, S, D) after RoPE. key: (B, H_kv, T, D) with the cache in front. value: (B, H_kv, T, D_v).
        attention_mask: what `mask.s2_mask` returned, or a 4-D mask of the user's.
        dropout, scaling: as in transformers.
        kwargs: position_ids, sliding_window, softcap, s_aux, is_causal ... as the architecture passes them.

    Returns:
        (B, S, H, D_v) and the attention weights or None.

    Raises:
        ValueError: a 4-D mask while sparse. NotImplementedError: softcap or sinks that the backend cannot do.

    Source: the interface of transformers.modeling_utils.AttentionInterface.
    """
    settings = settings_of(module)
    is_sparse = _is_sparse(module, settings, query, key, attention_mask, kwargs)
    if not is_sparse and settings.mesh is None:
        return _attend_densely(module, settings, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is None:  # a model that makes no mask has no padding and no packed rows
        attention_mask = S2Mask(dict(batch_size=query.shape[0], q_length=query.shape[2], device=query.device))
    how = dict(scaling=scaling, dropout=dropout, softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"))
    how["backend"] = settings.backend
    if settings.mesh is not None:
        return shared.attend(module, settings, query, key, value, attention_mask, is_sparse, how, kwargs), None
    pattern, positions = settings.pattern_of(module), _positions(settings, attention_mask, kwargs)
    return _attend(query, key, value, attention_mask, settings.group_size, pattern, positions, how), None


def _positions(settings: AttentionSettings, mask: S2Mask, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """(1 or B, S) positions that restart where a document starts, from cumulative lengths where they are given."""
    cu_seq_lens = settings.call.boundaries(kwargs)
    return settings.call.positions(kwargs) if cu_seq_lens is None else mask.positions(cu_seq_lens)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: S2Mask,
    group_size: int,
    pattern: str,
    position_ids: torch.Tensor | None,
    how: dict[str, Any],
) -> torch.Tensor:
    if torch.compiler.is_compiling():

        def make_plan() -> tuple[torch.Tensor, torch.Tensor]:
            segment_ids = mask.segment_ids(position_ids)
            return plan(segment_ids, *segment_ids.shape, group_size, pattern, query.device)

        once = partial(mask.once, f"tensors of {pattern}", make_plan)
        out = kernels.attend_compiled(query, key, value, once, **how)
        if out is not None:
            return out
    return kernels.attend(query, key, value, mask.groups(group_size, pattern, position_ids), **how)


def _is_sparse(
    module: nn.Module,
    settings: AttentionSettings,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: S2Mask | torch.Tensor | None,
    kwargs: dict[str, Any],
) -> bool:
    """Whether this call is one for S2-Attn: training, no cache in front, no window of the layer's own.

    Raises: ValueError: it would be, were it not for its mask.
    """
    if isinstance(mask, S2Mask):
        if mask.is_sparse is None:
            mask.is_sparse = settings.is_sparse(module.training)
        is_sparse, is_local, is_causal = mask.is_sparse, mask.is_local, mask.is_causal
    else:
        is_sparse, is_local, is_causal = settings.is_sparse(module.training), False, True
    is_local = is_local or kwargs.get("sliding_window") is not None
    if not is_sparse or is_local:
        return False
    if not is_causal_layer(module):
        if not torch.compiler.is_compiling():
            logger.warning_once(f"{type(module).__name__} is not causal, so S2-Attn leaves it as it is.")
        return False
    if cached := key.shape[2] - query.shape[2]:
        # Decoding passes here, too, but keeps no graph. One token attends to all that is cached either way.
        is_trained = module.training and torch.is_grad_enabled() and settings.pattern_of(module) != "full"
        if is_trained and query.shape[2] > 1 and not torch.compiler.is_compiling():
            logger.warning_once(
                f"{cached} cached tokens stand in front of the {query.shape[2]} to train on, as in prefix tuning: "
                f"S2-Attn has no groups for them, so this trains dense. Use another adapter (LoRA, prompt tuning) to "
                f"train sparse."
            )
        return False
    if not is_causal or kwargs.get("is_causal") is False:
        refuse_bidirectional()
    if isinstance(mask, torch.Tensor):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} cannot be cut into groups. Give a 2-D attention_mask "
            f"(1 = token, 0 = padding), position_ids that restart where a document starts, or both; or train dense "
            f"within `with use_attention(model, 'dense'):`."
        )
    return True


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

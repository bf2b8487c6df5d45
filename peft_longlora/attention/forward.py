"""What transformers calls in every layer: sparse attention while training, the model's own attention otherwise.

transformers finds `s2_attention_forward` under the name "s2_attn" (register.py); what it does in a layer stands in that
layer's settings (settings.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from peft_longlora.architecture import is_causal_layer
from peft_longlora.attention.dense import _attend_densely, _positions
from peft_longlora.attention.mask import S2Mask
from peft_longlora.attention.settings import AttentionSettings, settings_of
from peft_longlora.kernels import attend as kernels
from peft_longlora.kernels.cuts import plan
from peft_longlora.kernels.groups import refuse_bidirectional

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
    if not is_sparse and settings.sharing is None:
        return _attend_densely(module, settings, query, key, value, attention_mask, dropout, scaling, **kwargs)
    is_masked = isinstance(attention_mask, S2Mask)
    if attention_mask is None:  # a model that makes no mask has no padding and no packed rows
        attention_mask = S2Mask(dict(batch_size=query.shape[0], q_length=query.shape[2], device=query.device))
    how = dict(scaling=scaling, dropout=dropout, softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"))
    how["backend"] = settings.backend
    is_dense_forward = attention_mask.is_dense_forward if is_masked else settings.schedule.is_dense
    pattern = settings.pattern_of(module, is_dense_forward) if is_sparse else "full"
    if settings.sharing is not None:
        return settings.sharing.attend(module, settings, query, key, value, attention_mask, pattern, how, kwargs), None
    positions = _positions(settings, attention_mask, kwargs)
    return _attend(query, key, value, attention_mask, settings.group_size, pattern, positions, how), None


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
            mask.is_sparse, mask.is_dense_forward = settings.is_sparse(module.training), settings.schedule.is_dense
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

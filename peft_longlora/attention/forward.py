"""The function that transformers calls in every layer: sparse attention in training, the model's own attention
otherwise.

transformers finds `s2_attention_forward` under the name "s2_attn" (register.py). The layer's settings say what it does
(settings.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from peft_longlora.architecture import counts_from, counts_tokens, is_causal_layer
from peft_longlora.attention import dense
from peft_longlora.attention.caution import warn_of_packed
from peft_longlora.attention.layer import LayerCall
from peft_longlora.attention.mask import S2Mask
from peft_longlora.attention.ready import LastQueries
from peft_longlora.attention.settings import settings_of
from peft_longlora.attention.states import refuse_unfollowed
from peft_longlora.kernels.attend import attend
from peft_longlora.kernels.groups import refuse_bidirectional
from peft_longlora.kernels.kernel import Options

logger = logging.get_logger(__name__)


def s2_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: S2Mask | LastQueries | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function for `attn_implementation="s2_attn"`.

    Args:
        module: the attention layer; `training`, `layer_idx` and its settings are read.
        query: (B, H, S, D) after RoPE.
        key: (B, H_kv, T, D) with the cache in front.
        value: (B, H_kv, T, D_v).
        attention_mask: the result of `mask.s2_mask`, or the user's 4-D mask.
        dropout: probability at which attention weights are dropped.
        scaling: factor on the scores; None for D ** -0.5.
        kwargs: position_ids, sliding_window, softcap, s_aux, is_causal ... as the architecture passes them.

    Returns:
        (B, S, H, D_v) and the attention weights or None.

    Raises:
        ValueError: a 4-D mask while sparse. NotImplementedError: softcap or sinks that the backend cannot do.

    Source: the interface of transformers.modeling_utils.AttentionInterface.
    """
    if isinstance(attention_mask, LastQueries):
        whole, count = attention_mask.whole, attention_mask.count
        query = nn.functional.pad(query, (0, 0, whole.length - count, 0))
        out, _ = s2_attention_forward(module, query, key, value, whole, dropout, scaling, **kwargs)
        return out[:, -count:], None
    settings = settings_of(module)
    options = Options(scaling, dropout, kwargs.get("softcap"), kwargs.get("s_aux"), settings.backend)
    call = LayerCall(module, settings, query, key, value, attention_mask, options, kwargs)
    if settings.probe is not None:
        settings.probe(call)
    _refuse_packed(call)
    _refuse_unknown(kwargs)
    if not torch.compiler.is_compiling():
        warn_of_packed(call)
    is_sparse = _takes_pattern(call)
    if not is_sparse:
        settings.skips.refuse_dense(module)
    if settings.sharing is not None:
        return settings.sharing.attend(call, call.pattern if is_sparse else "full").contiguous(), None
    if not is_sparse:
        return dense.attend(call)
    refuse_unfollowed(settings, call.s2_mask, call.positions)
    pattern = call.pattern
    cuts, order = call.cuts(pattern), call.order
    if order is None:
        return attend(query, key, value, cuts, options).contiguous(), None  # some models view it in another shape
    # (B, S) token indices, for (B, H, S, D) and for (B, S, H, D_v)
    query, key, value = (x.gather(2, order[:, None, :, None].expand_as(x)) for x in (query, key, value))
    out = attend(query, key, value, cuts, options)
    return out.gather(1, order.argsort(1)[:, :, None, None].expand_as(out)), None


def _refuse_packed(call: LayerCall) -> None:
    """Refuse several documents in a row, or padding before one, for a layer that would count from the row's start.

    Raises: NotImplementedError.
    """
    refuses = call.settings.refuses_packed
    if not refuses and not counts_tokens(type(call.module)):
        return
    if not isinstance(call.mask, S2Mask) or not call.settings.is_enabled or call.cached:
        return
    if call.query.shape[2] <= (0 if refuses else counts_from(call.module)):
        return
    name = type(call.module).__name__
    if call.positions is not None and call.mask.is_packed(call.positions):
        raise NotImplementedError(
            refuses
            or f"{name} counts the tokens of a row by itself, also where a document starts, so packed documents would "
            f"not be computed as they are alone. Give each a row of its own (packing=False)."
        )
    if not refuses and call.mask.has_padding_in_front(call.positions):
        message = (
            f"{name} counts the tokens of a row by itself, padding before a document too, so in rows of more than "
            f"{counts_from(call.module):,} tokens the document would not be computed as it is alone."
        )
        if call.module.training:
            raise NotImplementedError(f"{message} Pad on the right (padding_side='right').")
        logger.warning_once(
            f"{message} transformers' own attention has the same fault. Give each row a call of its own."
        )


# Arguments of transformers' attentions that change what a layer computes and that no kernel here takes.
UNKNOWN = ("position_bias", "sinks", "indices", "block_indices")


def _refuse_unknown(more: dict[str, Any]) -> None:
    """Refuse what `trial` could not see, because nothing was run when S2-Attn was put on the model.

    Raises: NotImplementedError.
    """
    if found := [name for name in UNKNOWN if more.get(name) is not None]:
        raise NotImplementedError(
            f"This architecture gives its attention {', '.join(found)}, which the kernels of S2-Attn do not know: they "
            f"would leave it out. Load it with attn_implementation='sdpa' or 'eager'."
        )


def _takes_pattern(call: LayerCall) -> bool:
    """Whether S2-Attn runs this call: training, no cache in front, and no window of the layer.

    Raises: ValueError: S2-Attn should run it, but its mask cannot be cut into groups.
    """
    if not call.is_sparse or call.is_local:
        return False
    if not is_causal_layer(call.module):
        if not torch.compiler.is_compiling():
            logger.warning_once(f"{type(call.module).__name__} is not causal, so S2-Attn does not change it.")
        return False
    if call.cached:
        _warn_of_cache(call)
        return False
    if not call.is_causal:
        refuse_bidirectional()
    if isinstance(call.mask, torch.Tensor):
        raise ValueError(
            f"attention_mask of shape {tuple(call.mask.shape)} cannot be cut into groups. Give a 2-D attention_mask "
            f"(1 = token, 0 = padding), position_ids that restart where a document starts, or both; or train dense "
            f"within `with use_attention(model, 'dense'):`."
        )
    return True


def _warn_of_cache(call: LayerCall) -> None:
    """Warn once that a layer is dense because cached tokens stand in front of the trained ones."""
    # Decoding comes here too, but without gradients. A single token attends to the whole cache in any case.
    queries = call.query.shape[2]
    is_trained = call.module.training and torch.is_grad_enabled() and call.pattern != "full"
    if is_trained and queries > 1 and not torch.compiler.is_compiling():
        logger.warning_once(
            f"{call.cached} cached tokens stand in front of the {queries} to train on, as in prefix tuning: S2-Attn "
            f"has no groups for them, so this trains dense. Use another adapter (LoRA, prompt tuning) to train sparse."
        )

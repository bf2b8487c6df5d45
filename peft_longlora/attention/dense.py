"""Dense attention: what the model would compute without this package, with the mask it would get."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_longlora.architecture import is_causal_layer
from peft_longlora.attention.layer import LayerCall
from peft_longlora.attention.mask import S2Mask
from peft_longlora.kernels.attend import attend as attend_in_groups
from peft_longlora.kernels.backends import windowed
from peft_longlora.kernels.cuts import Cuts
from peft_longlora.kernels.kernel import Options


def attend(call: LayerCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, S, H, D_v) and the attention weights or None, from transformers' attention or from a kernel."""
    options, query = call.options, call.query
    positions = call.positions if call.is_sparse or _decides_alone(call) else None
    if (found := _for_kernels(call, positions)) is not None:
        return attend_in_groups(query, call.key, call.value, *found).contiguous(), None
    name, mask = call.settings.dense_attention, call.mask
    if isinstance(mask, S2Mask):
        mask = mask.dense(name, query.device, positions)
    if "flash" in name:
        return _flash(call, name, mask, **call.more), None
    if name == "eager":
        # Every modeling file has its own eager attention, and uses it only if no other implementation is set.
        function = sys.modules[type(call.module).__module__].eager_attention_forward
        if mask is None and _is_left_to_sdpa(call):
            mask = query.new_ones(query.shape[2], call.key.shape[2], dtype=torch.bool).tril()[None, None]
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:  # a static cache's mask, made for sdpa
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    else:
        function = ALL_ATTENTION_FUNCTIONS[name]
    how = dict(dropout=options.dropout, scaling=options.scaling)
    return function(call.module, query, call.key, call.value, mask, **how, **call.more)


def _is_left_to_sdpa(call: LayerCall) -> bool:
    """Whether the mask of a prompt in an empty static cache is missing, because sdpa would know what it is: causal,
    with the empty places of the cache behind the prompt."""
    return call.query.shape[2] > 1 and call.is_causal and call.settings.inputs.has_cache


def _for_kernels(call: LayerCall, positions: torch.Tensor | None) -> tuple[Cuts, Options] | None:
    """Cuts and options of a call that a kernel of this package computes; None: transformers' attention does."""
    settings, options = call.settings, call.options
    own = replace(options, backend=windowed(options.backend))
    if call.is_sparse and call.is_local and (cuts := call.local_cuts(positions)) is not None:
        return cuts, own
    is_fastest = settings.is_fastest and settings.is_enabled
    if is_fastest and (cuts := _whole_rows(call, positions)) is not None:
        return cuts, Options(scaling=options.scaling, dropout=options.dropout, sinks=options.sinks)
    cuts = _chunks_of_documents(call, positions)
    return None if cuts is None else (cuts, own)


def _decides_alone(call: LayerCall) -> bool:
    """Whether the positions of a call in evaluation say which tokens belong together: no mask and no cache came along.

    transformers' rule is the same, but some models do not hand their positions to the mask.
    """
    inputs = call.settings.inputs
    is_alone = inputs.caller is not None and inputs.attention_mask is None and not inputs.has_cache
    return is_alone and call.settings.is_enabled


def _chunks_of_documents(call: LayerCall, positions: torch.Tensor | None) -> Cuts | None:
    """The cuts of a layer with chunks in evaluation of packed rows; None if it has none, or if the rows are plain.

    transformers counts chunks from the start of the row if the model makes a cache, as it does by default.
    """
    if positions is None or call.is_sparse or not call.is_local or not isinstance(call.mask, S2Mask) or call.cached:
        return None
    if len(call.mask.runs(positions)) <= call.mask.batch:
        return None
    local = call.local(positions)
    return call.local_cuts(positions) if local is not None and local.kind == "chunks" else None


def _whole_rows(call: LayerCall, positions: torch.Tensor | None) -> Cuts | None:
    """The cuts of a dense call that kernels can run: whole rows, causal, without a softcap; otherwise None."""
    is_plain = isinstance(call.mask, S2Mask) and not call.cached and call.options.softcap is None
    if not is_plain or not call.is_causal:
        return None
    if call.is_local:
        return call.local_cuts(positions)
    groups = call.mask.whole_documents(positions)
    return None if groups is None else Cuts.of(groups)


def _flash(
    call: LayerCall,
    name: str,
    mask: torch.Tensor | None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> torch.Tensor:
    """A flash kernel by its transformers name.

    transformers' own wrapper is not called because it looks the kernel up by the model's implementation, which is
    "s2_attn" here (integrations/flash_attention.py).
    """
    return _flash_attention_forward(
        call.query.transpose(1, 2),
        call.key.transpose(1, 2),
        call.value.transpose(1, 2),
        mask,
        query_length=call.query.shape[2],
        is_causal=is_causal_layer(call.module) if is_causal is None else is_causal,
        dropout=call.options.dropout,
        softmax_scale=call.options.scaling,
        softcap=softcap,
        s_aux=s_aux,
        attn_implementation=name,
        **more,
    )

"""One call of PyTorch's scaled_dot_product_attention: pieces of one length, with sinks and a sliding window.

Called by `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from peft_longlora.kernels.kernel import Options
from peft_longlora.kernels.sinks import with_sink_key


def attend_piece(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options, window: int = 0
) -> torch.Tensor:
    """Causal attention of pieces: (n, H, S, D), (n, H_kv, S, D) -> (n, H, S, D_v).

    Args:
        options: scaling, dropout and sinks. window: keys that a query sees, itself included; 0 for all.
    """
    if window and window < query.shape[2]:
        return _attend_window(query, key, value, options, window)
    if options.sinks is None:
        return _call(query, key, value, options, is_causal=True)
    # A query in front, whose output is dropped: then the last query that sees the sink's key alone is that one.
    tensors = with_sink_key(pad(query, (0, 0, 1, 0)), key, value, options.sinks, options.scale(query.shape[3]))
    return _call(*tensors, options, is_causal=True, scale=options.scale(query.shape[3]))[:, :, 1:, : value.shape[3]]


def attend_masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, options: Options
) -> torch.Tensor:
    """Attention with a mask: (n, H, S, D), (n, H_kv, T, D) and (n or 1, 1, S, T) bool -> (n, H, S, D_v)."""
    if options.sinks is None:
        return _call(query, key, value, options, attn_mask=mask)
    scale = options.scale(query.shape[3])
    tensors = with_sink_key(query, key, value, options.sinks, scale)
    out = _call(*tensors, options, attn_mask=pad(mask, (1, 0), value=True), scale=scale)
    return out[..., : value.shape[3]]


def _call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options, **how: Any) -> torch.Tensor:
    how = {"scale": options.scaling, "dropout_p": options.dropout, **how}
    return scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1], **how)


def _attend_window(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options, window: int
) -> torch.Tensor:
    """Blocks of as many queries as the window holds: each sees its own block of keys and the one before."""
    count, _, length, _ = query.shape
    first = attend_piece(*(x[:, :, :window] for x in (query, key, value)), options)
    blocks = -(-length // window)
    query, key, value = (pad(x, (0, 0, 0, blocks * window - length)) for x in (query, key, value))
    # (n, H, blocks, W, D) -> (n * (blocks - 1), H, W, D)
    own = query.unflatten(2, (blocks, window))[:, :, 1:].transpose(1, 2).flatten(0, 1)
    # (n, H_kv, blocks - 1, D, 2 W) -> (n * (blocks - 1), H_kv, 2 W, D)
    key, value = (x.unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (key, value))
    at = torch.arange(2 * window, device=query.device)
    ask = at[:window, None]
    mask = ((at <= ask + window) & (at > ask))[None, None]
    rest = attend_masked(own, key, value, mask, options)
    rest = rest.unflatten(0, (count, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest[:, :, : length - window]], dim=2)

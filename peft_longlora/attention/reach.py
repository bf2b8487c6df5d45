"""Measures on a few rows how far each layer of a model attends, to choose the layers to keep dense."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from peft_longlora.architecture import find_attention_modules, find_text_model, is_local_layer, rows_of
from peft_longlora.attention.configure import configure_attention
from peft_longlora.attention.layer import LayerCall
from peft_longlora.attention.mode import use_attention
from peft_longlora.attention.settings import FASTEST, S2_ATTN, AttentionSettings, AttentionState, settings_of
from peft_longlora.few_tokens import at_rest
from peft_longlora.kernels.patterns import whole_number

# The first tokens of a row attract attention from everywhere, whatever they say. This does not count as reach.
SINKS = 128


def far_layers(
    model: nn.Module, rows: Iterable[torch.Tensor | Sequence[int]], beyond: int, *, queries: int = 64
) -> dict[int, float]:
    """The layers of a model with the share of their attention that goes far, largest share first.

    A layer's share is the mean over heads, rows and queries of the attention weights on keys that are `beyond` or more
    tokens before the query; the first 128 tokens of the row are left out. The model attends densely, in evaluation
    mode. `queries` queries of each row are used, so memory is O(queries * S), never S * S.

    Args:
        model: a causal language model of transformers, bare or with an adapter; it is not changed.
        rows: token ids, (S,) or (1, S) each, one document in a row, without padding.
        beyond: tokens; give the group size of the planned training.
        queries: the number of queries in each row, evenly spaced over those that have far keys.

    Returns: {layer index: share from 0 to 1}, largest first. Layers that have a window or chunks have 0.

    Raises:
        ValueError: there are no rows, a row is no list of the model's token ids, has another shape or is too short for
            a far key, `beyond` or `queries` is below 1, or the model's ranks share sequences.
        NotImplementedError: as `configure_attention`.

    Examples:
        >>> far = far_layers(model, rows, beyond=8192)
        >>> config = LongLoraConfig(context_length=32768, dense_layers=sorted(list(far)[:5]))
    """
    for name, value in (("beyond", beyond), ("queries", queries)):
        if (whole_number(value) or 0) < 1:
            raise ValueError(f"{name}={value!r} must be a whole number, 1 or more.")
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    vocabulary = rows_of(whole.get_input_embeddings())
    rows = [_as_row(row, number, beyond, vocabulary) for number, row in enumerate(rows)]
    if not rows:
        raise ValueError("rows is empty: give one or more rows of token ids, each longer than beyond + 128 tokens.")
    text = find_text_model(whole)
    backbone = getattr(text, "base_model", text)
    with _attending_densely(model, whole) as settings:
        probe = _Probe(beyond, queries)
        for one in settings:
            one.probe = probe
        try:
            for row in rows:
                with torch.no_grad():
                    backbone(input_ids=row.to(text.device), use_cache=False)
        finally:
            for one in settings:
                one.probe = None
    figures = {layer: sum(shares) / len(shares) for layer, shares in probe.shares.items()}
    return dict(sorted(figures.items(), key=lambda item: (-item[1], item[0])))


def _as_row(row: torch.Tensor | Sequence[int], number: int, beyond: int, vocabulary: int) -> torch.Tensor:
    """(1, S) token ids."""
    try:
        ids = torch.as_tensor(row)
        is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool) or not ids.numel()
    except (TypeError, ValueError, RuntimeError):
        is_whole = False
    if not is_whole:
        raise ValueError(
            f"rows[{number}] is a {type(row).__name__} that holds no whole numbers. Give each row as token ids, for "
            f"example tokenizer(text)['input_ids']."
        )
    ids = ids.long()
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"rows[{number}] has shape {tuple(ids.shape)}: give each row as (S,) or (1, S) token ids.")
    if ids.shape[1] <= beyond + SINKS:
        raise ValueError(
            f"rows[{number}] has {ids.shape[1]} tokens, so no query has a key {beyond} tokens before it behind the "
            f"first {SINKS}. Give rows of more than {beyond + SINKS} tokens, best of the length that you will train at."
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:  # a GPU would end the process
        raise ValueError(
            f"rows[{number}] has token ids from {int(ids.min())} to {int(ids.max())}, and the model has {vocabulary}, "
            f"from 0 on. Give rows of this model's tokenizer, without -100."
        )
    return ids


@contextmanager
def _attending_densely(model: nn.Module, whole: nn.Module) -> Iterator[list[AttentionSettings]]:
    """The settings of all layers, while the model attends densely in evaluation mode."""
    before = None
    if whole.config._attn_implementation != S2_ATTN:
        before = AttentionState.of(whole)
        configure_attention(whole)
    try:
        settings = list({id(s): s for s in map(settings_of, find_attention_modules(whole).values())}.values())
        if any(one.sharing is not None for one in settings):
            raise ValueError("The ranks of this model share sequences. Measure within `with unshared(model):`.")
        with at_rest(model), use_attention(whole, "dense", dense_attention=FASTEST):
            yield settings
    finally:
        if before is not None:
            before.put_on(whole)


@dataclass
class _Probe:
    """Sums the weights of far keys in each layer.

    Attributes:
        beyond, queries: as in `far_layers`. shares: for each layer one number a row.
    """

    beyond: int
    queries: int
    shares: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __call__(self, call: LayerCall) -> None:
        """Called by a layer with a row."""
        layer = call.module.layer_idx
        if call.is_local or is_local_layer(call.module, call.module.config):
            self.shares[layer].append(0.0)
            return
        heads, length = call.query.shape[1:3]
        device = call.query.device
        first = self.beyond + SINKS
        at = torch.linspace(first, length - 1, min(self.queries, length - first), device=device).round().long()
        key_at = torch.arange(length, device=device)
        is_later = key_at > at[:, None]
        is_far = (key_at <= at[:, None] - self.beyond) & (key_at >= SINKS)
        share, kv_heads = torch.zeros((), device=device), call.key.shape[1]
        for kv_head in range(kv_heads):
            # (H / H_kv, queries, D) and (S, D) -> (H / H_kv, queries, S)
            own = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
            query = call.query[0, own, at]
            scores = (query @ call.key[0, kv_head].T).float() * call.options.scale(query.shape[-1])
            if softcap := call.options.softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(is_later, -torch.inf)
            if call.options.sinks is not None:
                sinks = call.options.sinks[own].float()[:, None, None].expand(*scores.shape[:2], 1)
                scores = torch.cat([scores, sinks], dim=-1)
            weights = scores.softmax(-1)[..., :length]
            share += (weights * is_far).sum(-1).mean(1).sum()
        self.shares[layer].append(share.item() / heads)

"""`use_attention` says for a block of code how a model attends: sparse, dense or as it is in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import FASTEST, S2_ATTN, Mode, settings_of


@contextmanager
def use_attention(model: nn.Module, mode: Mode, *, dense_attention: str | None = None) -> Iterator[None]:
    """Within the block, attend as `mode` says. It works on bare and on PEFT models.

    Args:
        model: a model whose attention is "s2_attn".
        mode: "auto" (sparse while `module.training`), "sparse" (in evaluation and prefill too, to measure a pattern
            by itself) or "dense".
        dense_attention: "fastest" as in `configure_attention`, for evaluation; None: no change.

    Raises:
        ValueError: an unknown mode, a model without S2-Attn, or "sparse" while its adapter is disabled.
    """
    if mode not in ("auto", "sparse", "dense"):
        raise ValueError(f"mode={mode!r} is unknown. Use 'auto', 'sparse' or 'dense'.")
    if dense_attention not in (None, FASTEST):
        raise ValueError(
            f"dense_attention={dense_attention!r} cannot be set for a block of code. Use None or 'fastest' here, or "
            f"name a transformers attention in configure_attention(model, dense_attention=...)."
        )
    layers = find_attention_modules(model).values()
    if not layers or any(getattr(m.config, "_attn_implementation", S2_ATTN) != S2_ATTN for m in layers):
        raise ValueError(
            "This model does not use S2-Attn. Load it with attn_implementation='s2_attn', call configure_attention, "
            "or add a LongLoraConfig adapter first."
        )
    before = {id(s): (s, s.mode, s.is_fastest) for s in map(settings_of, layers)}
    if mode == "sparse" and not all(settings.is_enabled for settings, *_ in before.values()):
        raise ValueError(
            "The adapter with S2-Attn is disabled, so the model is its base, which is dense. Leave "
            "disable_adapter() first, or call configure_attention(model) on the base."
        )
    try:
        for settings, *_ in before.values():
            settings.mode = mode
            settings.is_fastest = settings.is_fastest or dense_attention == FASTEST
        yield
    finally:
        for settings, *previous in before.values():
            settings.mode, settings.is_fastest = previous

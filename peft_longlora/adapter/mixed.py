"""Batches whose rows belong to different adapters, or to the base: `model(..., adapter_names=["a", "__base__", ...])`.

PEFT gives each row its adapter's LoRA and its copies of embeddings. Rows of the base also need the base's RoPE, which
this file gives them. Such batches are for inference; PEFT refuses them in training mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_longlora.adapter import copies
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of
from peft_longlora.rope.state import STATES, RopeState

BASE = "__base__"
MIXABLE = (nn.Linear, nn.Embedding)  # of the modules that are copied, those that PEFT can mix in a batch


def check_mixed(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Refuse a batch whose rows cannot be computed apart.

    Raises: ValueError.
    """
    if copies.learned_rotary(model) is not None:
        raise ValueError(
            f"adapter_names={list(names)!r}: the adapters learned their RoPE (rope_type='learned'), and a batch has "
            f"one. Run the rows of each adapter by themselves, after model.set_adapter(name)."
        )
    for wrapper in copies.wrappers_of(model):
        if not isinstance(wrapper.original_module, MIXABLE) and not wrapper.disable_adapters:
            raise ValueError(
                f"adapter_names={list(names)!r}: the adapters train a copy of every "
                f"{type(wrapper.original_module).__name__}, which PEFT cannot mix in a batch. Run the rows of each "
                f"adapter by themselves, after model.set_adapter(name), or train with train_norms=False."
            )
    if BASE not in names or not hasattr(model, STATES):
        return
    settings = settings_of(next(iter(find_attention_modules(model).values())))
    if settings.mode == "sparse":
        raise ValueError(
            f"adapter_names={list(names)!r}: the base is dense, so its rows cannot be in a batch within "
            f"use_attention(model, 'sparse'). Run them by themselves, inside model.disable_adapter()."
        )
    if "llama_4_scaling_beta" in (getattr(model, STATES)[0].rope_parameters or {}):
        raise ValueError(
            f"adapter_names={list(names)!r}: the attention of {model.config.model_type} scales its queries by the "
            f"window in its config, and a batch has one config. Run the rows of {BASE!r} by themselves, inside "
            f"model.disable_adapter()."
        )


@contextmanager
def base_rows(model: PreTrainedModel, names: Sequence[str], repeats: int = 1) -> Iterator[None]:
    """Within the block, rows named "__base__" get the base's RoPE.

    Args:
        names: one for each row. repeats: how often generation repeats each row (its beams).
    """
    handles = []
    if BASE in names and hasattr(model, STATES):
        rows = tuple(name == BASE for name in names for _ in range(repeats))
        state: RopeState = getattr(model, STATES)[0]
        handles = [
            module.register_forward_hook(_BaseRows(twin, rows), with_kwargs=True)
            for module, twin in state.twins_on(model)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(eq=False)
class _BaseRows:
    """A hook of a rotary module: takes the outputs for the base's rows from a module with the base's RoPE."""

    twin: nn.Module
    rows: tuple[bool, ...]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["x"]
        if len(hidden) != len(self.rows):  # PEFT says what is wrong with the names
            return output
        base = self.twin(*args, **kwargs)
        if isinstance(output, tuple):
            return tuple(self._chosen(*pair) for pair in zip(base, output, strict=True))
        return self._chosen(base, output)

    def _chosen(self, base: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        """Rows are the third dimension from the end: (B or 1, S, D), or (3, B or 1, S, D) of models that see."""
        if scaled.dim() < 3 or scaled.shape[-3] not in (1, len(self.rows)):
            raise NotImplementedError(
                f"RoPE of shape {tuple(scaled.shape)} has no row for each of {len(self.rows)} rows, so rows of "
                f"{BASE!r} cannot be in a batch. Run them by themselves, inside model.disable_adapter()."
            )
        is_base = torch.tensor(self.rows, device=scaled.device)[:, None, None]
        return torch.where(is_base, base, scaled)

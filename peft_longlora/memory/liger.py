"""Liger's kernels for a loaded model, if Liger is installed. Called by `fit`.

transformers switches them on, as its Trainer does with `use_liger_kernel=True`. They compute norms, RoPE and
feed-forward layers without float32 copies, and the loss without logits of the whole row.
"""

from __future__ import annotations

from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from peft_longlora.architecture import has_liger_kernels


def kernels_of(model: nn.Module) -> tuple[str, ...]:
    """Libraries whose kernels compute the model's norms or feed-forward layers.

    Returns: ("Liger",) or ().
    """
    return ("Liger",) if has_liger_kernels(model) else ()


def use_liger(model: nn.Module, fused_loss: bool) -> tuple[str, ...]:
    """Switch Liger's kernels on, unless the model has them, or Liger is missing or does not know the model.

    Args:
        model: a model of transformers, bare or PEFT.
        fused_loss: whether the model's own loss makes no logits.

    Returns: as `kernels_of`.
    """
    if not kernels_of(model) and is_liger_kernel_available():
        apply_liger_kernel(model, {"fused_linear_cross_entropy": fused_loss, "cross_entropy": False})
    return kernels_of(model)

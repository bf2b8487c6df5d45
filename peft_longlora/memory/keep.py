"""Checkpointed blocks that keep the outputs of attention, which cost most to compute a second time.

torch's selective checkpointing asks a function about every operator. Give `keep_attention` to transformers and its
Trainer with the arguments of `torch.utils.checkpoint`: gradient_checkpointing_kwargs=dict(use_reentrant=False,
context_fn=keep_attention).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_aten = torch.ops.aten
# Each returns the output and the log-sum-exp, (B, H, S) float32. A backward of attention needs nothing else.
ATTENTION = frozenset(
    {
        _aten._flash_attention_forward.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
NAMESPACE = "peft_longlora"


def is_attention(operator: Any) -> bool:
    """Whether an operator is an attention forward, of PyTorch or of this package."""
    return operator in ATTENTION or getattr(operator, "namespace", None) == NAMESPACE


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_attention(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def keep_attention() -> tuple[Any, Any]:
    """A `context_fn` for `torch.utils.checkpoint.checkpoint`: keep attention's outputs, compute the rest again.

    It costs 2 * H * D_v bytes a token and block in half precision, and 4 * H for the log-sum-exp.
    """
    return create_selective_checkpoint_contexts(_policy)

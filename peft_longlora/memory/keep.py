"""Checkpointed blocks that keep the outputs of attention, which cost most to compute a second time.

torch's selective checkpointing asks a function about every operator. Give `keep_attention` to transformers and its
Trainer with the arguments of `torch.utils.checkpoint`: gradient_checkpointing_kwargs=dict(use_reentrant=False,
context_fn=keep_attention). Selective checkpointing has no place for tensors outside the GPU, so `keep_in_host` is a
pair of modes of its own, which do the same for attention alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from peft_longlora.memory.places import HostMemory

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


def _is_kept(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call's output is kept: attention without dropout.

    Dropout takes random numbers. If the second forward left attention out, everything random behind it (LoRA's dropout)
    would take other ones than the first.
    """
    if not is_attention(operator):
        return False
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs
    return not given.get("dropout_p")


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operator, args, kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


def keep_attention() -> tuple[Any, Any]:
    """A `context_fn` for `torch.utils.checkpoint.checkpoint`: keep attention's outputs, compute the rest again.

    It costs 2 * H * D_v bytes a token and block in half precision, and 4 * H for the log-sum-exp. Attention with
    dropout is computed again.
    """
    return create_selective_checkpoint_contexts(_policy)


def keep_in_host(host: HostMemory, block: int) -> tuple[Any, Any]:
    """As `keep_attention`, but the outputs wait in the host's memory."""
    kept: list[Any] = []
    return _Keep(kept, host, block), _Recall(kept, host)


class _Keep(TorchDispatchMode):
    """The forward: outputs of attention go to the host."""

    def __init__(self, kept: list[Any], host: HostMemory, block: int):
        super().__init__()
        self.kept, self.host, self.block = kept, host, block

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if _is_kept(function, args, kwargs or {}):
            # Detached, because autograd will give its history to the tensor that is returned.
            self.kept.append(tree_map_only(torch.Tensor, lambda x: self.host.put(x.detach(), self.block), out))
        return out


class _Recall(TorchDispatchMode):
    """The second forward: attention is not computed again."""

    def __init__(self, kept: list[Any], host: HostMemory):
        super().__init__()
        self.kept, self.host, self.next = kept, host, 0

    def __enter__(self) -> Any:
        self.next = 0
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(function, args, kwargs or {}):
            return function(*args, **(kwargs or {}))
        out, self.kept[self.next] = self.kept[self.next], None
        self.next += 1
        if out is None:
            raise RuntimeError(
                "A second backward through a block that keeps its attention in the host's memory. Call backward once."
            )
        return type(out)(self.host.get(x) for x in out)

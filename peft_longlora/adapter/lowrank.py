"""The low-rank product of an adapted projection in the base's half precision, added inside one matrix product.

PEFT keeps LoRA's weights in float32 and computes with them in float32: each adapted projection casts its whole input,
(B, S, in), and its whole output, (B, S, out), to float32 and back. In a 7B step at 32768 tokens this takes a fifth of
the time, and the cast inputs are kept for the backward. Here the float32 weights are rounded instead (only r rows), and
the matrix product adds its result to the base's output in place (cuBLAS's `beta`). Sums inside the products stay in
float32, as in the base's own projection. The gradients of the weights are float32.

It runs only in training, and only in the simple case that `is_plain` defines. Otherwise PEFT's own forward runs, so
evaluation, generation and merged weights give the same results as without it. `model` calls it when a layer is made.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

from peft_longlora.adapter.precision import HALF
from peft_longlora.rope.mixing import Mixin, mix


class _AddLowRank(torch.autograd.Function):
    """result += scaling * (x @ a.T) @ b.T, with a and b rounded to the dtype of x."""

    @staticmethod
    def forward(ctx, result, x, a, b, scaling):
        flat = x.reshape(-1, x.shape[-1])  # (B, S, in) -> (B * S, in)
        low = flat @ a.to(x.dtype).T  # (B * S, r)
        result.view(-1, result.shape[-1]).addmm_(low, (b * scaling).to(x.dtype).T)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, low, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_low = flat @ (b * ctx.scaling).to(x.dtype)  # (B * S, r)
        grad_x = (grad_low @ a.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        grad_a = _product(grad_low.T, x.reshape(-1, x.shape[-1]), a) if ctx.needs_input_grad[2] else None
        grad_b = _product(flat.T, low, b) * ctx.scaling if ctx.needs_input_grad[3] else None
        return grad, grad_x, grad_a, grad_b, None


def _product(left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A sum over all tokens, in the weight's dtype: rounded once if the device can do that, otherwise twice."""
    if left.is_cuda and weight.dtype == torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(weight.dtype)


def add_low_rank(
    result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The output of an adapted projection: result + scaling * (x @ a.T) @ b.T.

    Args:
        result: (..., out), the base projection's output; it is changed in place and returned, if it has the dtype of x.
        x: (..., in) float16 or bfloat16. a: (r, in), b: (out, r), float32 or the same dtype.
        scaling: LoRA's alpha / r.

    Returns: (..., out), dtype of result.
    """
    if result.dtype != x.dtype:  # the base computes in another precision, as under autocast: as PEFT does
        low = nn.functional.linear(x.to(a.dtype), a)
        return (result + nn.functional.linear(low, b) * scaling).to(result.dtype)
    if torch.compiler.is_compiling() or not result.is_contiguous() or result._is_view():
        # A compiler fuses by itself, and a view must not be changed in place.
        low = nn.functional.linear(x, a.to(x.dtype))
        return result + nn.functional.linear(low, (b * scaling).to(x.dtype))
    return _AddLowRank.apply(result, x, a, b, scaling)


class HalfLowRank(Mixin):
    """Mixed into a LoRA layer's class: in training its forward uses `add_low_rank`."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The projection with its active adapters."""
        if args or not is_plain(self, x, kwargs):
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self.lora_A[name].weight, self.lora_B[name].weight
                result = add_low_rank(result, self.lora_dropout[name](x), a, b, self.scaling[name])
        return result

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` asks each layer; it would leave the RoPE scaling and trained copies out.

        Raises: ValueError.
        """
        raise ValueError(
            "convert_to_lora would drop the RoPE scaling and the trained embeddings and norms of a LongLoRA adapter. "
            "Use peft_longlora.export_lora(model, folder), which writes a plain LoRA adapter and says what it needs."
        )


def is_plain(layer: LoraLayer, x: torch.Tensor, options: dict[str, Any]) -> bool:
    """Whether a call is the simple case: training in half precision, adapters on and unmerged, LoRA without variants.

    It does not depend on whether gradients are on, because reentrant checkpointing computes first without and then with
    them. Hooks on LoRA's own small layers mean that another library provides their weights (FSDP, DeepSpeed ZeRO-3,
    accelerate's device maps). Then these layers must be called, as PEFT does.
    """
    if not (layer.training and x.dtype in HALF) or layer.disable_adapters or layer.merged:
        return False
    if layer.lora_variant or any(value is not None for value in options.values()):
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    parts = [part for name in names for part in (layer.lora_A[name], layer.lora_B[name])]
    return bool(names) and all(_is_bare(part) and part.weight.dtype in (torch.float32, x.dtype) for part in parts)


def _is_bare(part: nn.Module) -> bool:
    is_hooked = part._forward_pre_hooks or part._forward_hooks or "forward" in vars(part)
    is_whole = type(part.weight) is nn.Parameter and not hasattr(part.weight, "ds_id")
    return type(part) is nn.Linear and part.bias is None and not is_hooked and is_whole


def compute_in_half(layer: nn.Module) -> None:
    """Make a LoRA layer of a plain or a 4-bit projection compute in half precision while it trains.

    Other layers (embeddings, convolutions, other quantisations) stay PEFT's own.
    """
    kind = type(layer)
    is_4bit = kind.__name__ == "Linear4bit" and kind.__module__ == "peft.tuners.lora.bnb"
    if kind is Linear or is_4bit:
        mix(layer, HalfLowRank)

"""A frozen projection computed in float8, for benchmarks/training.py.

torchao's float8 layers compute the gradient of their weight too, and round the weight anew in every step. The base of
an adapter needs neither: its weight is rounded once, by rows for the forward and by columns for the gradient of the
input, and both products are torch's `_scaled_mm` with a scale for each token and each output.
"""

from __future__ import annotations

import torch
from torch import nn

LARGEST = 448.0  # of float8 e4m3


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 numbers and a float32 scale for each row of (M, K): x is about numbers * scale."""
    if x.is_cuda:
        import float8_kernel  # Triton comes with torch for GPUs

        return float8_kernel.round_rows(x)
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, fast: bool) -> torch.Tensor:
    """(..., K) @ weight.T, x rounded by rows; weight (N, K) float8 with scales (N, 1).

    Args:
        fast: whether the tensor cores may sum in fewer bits; as in torchao, in the forward but not in gradients.
    """
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    numbers, of_rows = round_rows(x.reshape(-1, x.shape[-1]))
    flat = out.view(-1, out.shape[-1])
    if x.is_cuda:
        how = dict(scale_a=of_rows, scale_b=scale.T, out_dtype=x.dtype, use_fast_accum=fast)
        torch._scaled_mm(numbers, weight.T, **how, out=flat)
    else:
        flat.copy_((numbers.float() * of_rows) @ (weight.float() * scale).T)
    return out


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return product(x, layer.rows, layer.row_scales, fast=True)

    @staticmethod
    def backward(ctx, grad):
        return product(grad, ctx.layer.columns, ctx.layer.column_scales, fast=False), None


class FrozenFloat8(nn.Module):
    """A linear layer without bias, frozen, as float8 numbers."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, weight in (("row", linear.weight), ("column", linear.weight.T)):
            numbers, scales = round_rows(weight.detach())
            self.register_buffer(f"{name}s", numbers)
            self.register_buffer(f"{name}_scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return _Frozen.apply(x, self)


def freeze_in_float8(model: nn.Module) -> None:
    """Replace every frozen linear layer in the model's blocks."""
    for block in model.get_base_model().model.layers:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and not child.weight.requires_grad and child.bias is None:
                    setattr(parent, name, FrozenFloat8(child))

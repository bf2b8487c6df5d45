"""Train copies of embeddings and norms in float32 while they compute in the base's half precision.

PEFT keeps LoRA weights in float32 but leaves copied modules in bfloat16. A step of 2e-5 is too small to change its 8
bits, so norms would not train at all. Here the stored weights are float32, and every forward rounds them. So a trained
copy computes what the base's module would compute with the rounded weights, and merging changes nothing. Who reads the
weights while the model computes gets the rounded ones too: Nemotron-H and Zaya cast to the dtype of a norm, and fused
losses (Liger's, TRL's) multiply by the output layer's matrix without calling it. Called by `model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from peft_longlora.adapter.called import is_in_a_call
from peft_longlora.rope.mixing import Mixin, mix, unmix

HALF = (torch.float16, torch.bfloat16)
ROWS = 4096  # rows of embeddings that are float32 at a time


class _HalfRows(torch.autograd.Function):
    """Rows of a float32 matrix in half precision. A row of 131072 tokens has 2 GiB in float32, so parts are rounded."""

    @staticmethod
    def forward(ctx, ids, weight, padding_idx, dtype):
        ctx.save_for_backward(ids)
        ctx.size, ctx.dtype, ctx.padding_idx = weight.shape, weight.dtype, padding_idx
        rows = weight.new_empty(ids.numel(), weight.shape[1], dtype=dtype)
        for part, some in zip(ids.reshape(-1).split(ROWS), rows.split(ROWS), strict=True):
            some.copy_(weight[part])
        return rows.view(*ids.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.size, dtype=ctx.dtype)
        parts = zip(ids.reshape(-1).split(ROWS), grad.reshape(-1, ctx.size[1]).split(ROWS), strict=True)
        for part, some in parts:
            if ctx.padding_idx is not None:
                some = some.masked_fill((part == ctx.padding_idx)[:, None], 0)
            total.index_add_(0, part, some.to(ctx.dtype))
        return None, total, None, None


class Float32Weights(Mixin):
    """Mixed into a module's class: its parameters are float32, but its forward uses them in `compute_dtype`."""

    compute_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward on rounded weights; gradients reach the float32 ones.

        The rounded weights are attributes of an object of this call, because threads may share the module. torch's own
        ways to exchange weights (functional_call, parametrize) change the shared module while it computes.
        """
        kind = self.original_class
        # Replicas of nn.DataParallel have plain tensors in place of parameters.
        weights = {**self._parameters, **self.__dict__.get("_former_parameters", {})}
        if kind.forward is nn.Embedding.forward and self.max_norm is None:
            # Look the rows up first: rounding all of the matrix for one token of an answer would take a second.
            if not (self.scale_grad_by_freq or self.sparse or torch.compiler.is_compiling()):
                ids = args[0] if args else kwargs["input"]
                return _HalfRows.apply(ids, weights["weight"], self.padding_idx, self.compute_dtype)
            rows = nn.functional.embedding(
                args[0] if args else kwargs["input"],
                weights["weight"],
                self.padding_idx,
                scale_grad_by_freq=self.scale_grad_by_freq,
                sparse=self.sparse,
            )
            return rows.to(self.compute_dtype)
        own = kind.__new__(kind)
        own.__dict__.update(self.__dict__)
        own.__dict__.update({name: w.to(self.compute_dtype) for name, w in weights.items() if w is not None})
        return kind.forward(own, *args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # `model.float()` and similar calls change the computation as well as the storage.
        module = super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return module


class RoundedReading(Mixin):
    """Mixed into PEFT's wrapper of copies: who computes with weights read through it gets what the copy computes with.

    They are rounded only while something is computed. Who reads them between calls gets the trained ones, to write into
    (the embeddings of new tokens), to optimise or to look at their gradients.
    """

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, torch.Tensor):
            for copy in self.modules_to_save.values():
                if isinstance(copy, Float32Weights) and getattr(copy, name, None) is value:
                    return value.to(copy.compute_dtype) if _is_computed_with(value) else value
        return value


def _is_computed_with(weight: torch.Tensor) -> bool:
    kind = weight.device.type
    # Autocast rounds matrices by itself, and a fused loss then adds up its gradient in float32. "meta" has no autocast.
    if weight.dim() > 1 and kind != "meta" and torch.is_autocast_enabled(kind):
        return False
    # What is compiled computes. In a backward a checkpointed function is recomputed, without the call that it was in.
    return torch.compiler.is_compiling() or torch._C._current_autograd_node() is not None or is_in_a_call()


def _follow_class(module: nn.Module) -> None:
    # accelerate's hooks (device_map) call the `forward` that they found when they were added.
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(type(module).forward, module)


def keep_in_float32(modules: Iterable[nn.Module]) -> None:
    """Store the weights of half-precision modules in float32; their results stay the same.

    Args:
        modules: all modules that may share a weight, in one call. Parameters stay the same objects, so ties and
            optimisers stay valid. Modules with children, quantised modules and float32 modules are not changed.
    """
    dtypes = [(module, {p.dtype for p in module.parameters()}) for module in modules]
    for module, found in dtypes:
        is_plain = not isinstance(module, Float32Weights) and not any(True for _ in module.children())
        if is_plain and len(found) == 1 and found <= set(HALF):
            for parameter in module.parameters():
                parameter.data = parameter.data.float()
            mix(module, Float32Weights)
            _follow_class(module)
            module.compute_dtype = found.pop()


def read_rounded(wrappers: Iterable[nn.Module]) -> None:
    """Give who computes with weights read through these wrappers the rounded ones of copies kept in float32."""
    for wrapper in wrappers:
        if not isinstance(wrapper, RoundedReading):
            mix(wrapper, RoundedReading)


def round_to_half(module: nn.Module) -> None:
    """Undo `keep_in_float32` and round the weights permanently. Other modules are not changed."""
    if isinstance(module, Float32Weights):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(module.compute_dtype)
        del module.__dict__["compute_dtype"]
        unmix(module)
        _follow_class(module)

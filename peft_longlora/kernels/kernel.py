"""What an attention call needs of a kernel, and what every kernel does: the interface behind which they differ.

A kernel attends causally inside pieces, or to far keys, for one part of the heads, and writes into tensors that it is
given: that way the parts of the heads share one output and one set of gradients, and nothing is concatenated. `flash`
and `aten` hold the kernels, `halves` and `halo` call them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch

HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """What an attention call needs, as far as a kernel may not have it; is_grouped: H > H_kv."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    value_dim: int
    is_grouped: bool = False
    dropout: float = 0.0
    softcap: float = 0.0
    has_sinks: bool = False
    requires_grad: bool = False


@dataclass(frozen=True)
class Pieces:
    """Where attention is cut; cu_seqlens is None for tensors of (pieces, tokens, heads, D), all pieces alike.

    With `far`, where keys and values of other tokens are cut into as many pieces, each query attends to all of its own;
    without, causally to those of the queries' tokens.
    """

    cu_seqlens: torch.Tensor | None
    max_length: int
    far: Pieces | None = None

    @property
    def is_causal(self) -> bool:
        """Whether keys are those of the queries' tokens, and later ones are not seen."""
        return self.far is None

    @property
    def keys(self) -> Pieces:
        """Where the keys are cut."""
        return self.far or self


class Kernel:
    """Attention that writes where it is told: what every kernel shares, and what each must have.

    A backward takes the out and lse of the whole softmax, of which its keys may be a part (`Pieces.far`).

    Tensors are (tokens, heads, D) with `Pieces.cu_seqlens`, or (pieces, tokens, heads, D) without; lse, the
    log-sum-exp of the scores, is (heads, tokens) or (pieces, heads, tokens), float32. All may be strided views.

    Attributes:
        name: of the backend. install: how a user gets it.
        takes_pieces: whether it takes cu_seqlens. takes_batches: whether it takes a batch of pieces of one length.
        ties_layouts: whether its backward needs q, out and the gradient of out to be laid out alike.
        capabilities: the first and the last major compute capability it runs on.
        most_dim: its largest head dim.
        has_softcap: whether it has one. may_differ: whether D_v may differ from D where H == H_kv.
    """

    name: ClassVar[str]
    install: ClassVar[str] = "it comes with PyTorch for CUDA"
    takes_pieces: ClassVar[bool] = True
    takes_batches: ClassVar[bool] = False
    ties_layouts: ClassVar[bool] = False
    capabilities: ClassVar[tuple[int, int]] = (8, 99)
    most_dim: ClassVar[int] = 256
    has_softcap: ClassVar[bool] = True
    may_differ: ClassVar[bool] = False

    def missing(self, device: torch.device) -> str | None:
        """Why this kernel cannot run on a device at all, or None."""
        if device.type != "cuda":
            return f"it runs on CUDA devices, and the tensors are on {device.type!r}"
        if torch.version.hip:
            return "it needs an NVIDIA GPU"
        (least, most), (major, minor) = self.capabilities, torch.cuda.get_device_capability(device)
        if not least <= major <= most:
            span = f"{least}.x or newer" if most > 90 else f"{least}.x to {most}.x"
            return f"it needs compute capability {span}, and this GPU has {major}.{minor}"
        module = self.load()
        return module if isinstance(module, str) else None

    def load(self) -> ModuleType | str | None:
        """The module that holds it, or why there is none."""

    def lacks(self, call: Call) -> str | None:
        """What a call needs and this kernel does not have, or None."""
        if call.dtype not in HALF_TYPES:
            return f"it computes in float16 or bfloat16, not {call.dtype}"
        if call.dropout:
            return f"it is called without dropout here, and dropout={call.dropout} was asked for"
        if call.softcap and not self.has_softcap:
            return f"it has no softcap, and softcap={call.softcap} was asked for"
        if call.has_sinks:
            return "it is called without attention sinks here"
        for dim in (call.dim, call.value_dim):
            if dim % 8 or not 8 <= dim <= self.most_dim:
                return f"its head dim is a multiple of 8 up to {self.most_dim}, not {dim}"
        if call.dim != call.value_dim and (call.is_grouped or not self.may_differ):
            rule = "if queries share KV heads, " if self.may_differ else ""
            return f"{rule}its value heads are as wide as its query heads, not {call.value_dim} and {call.dim}"
        return None

    def forward(self, q, k, v, out, lse, pieces: Pieces, scaling: float, softcap: float) -> None:
        """Fill out and lse."""
        raise NotImplementedError

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces: Pieces, scaling: float, softcap: float) -> None:
        """Fill dq, dk and dv, the same way at every call if PyTorch is in deterministic mode."""
        raise NotImplementedError


def is_deterministic() -> bool:
    """Whether `torch.use_deterministic_algorithms(True)` holds."""
    return torch.are_deterministic_algorithms_enabled()

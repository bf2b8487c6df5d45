"""The interfaces: the options of an attention, what a call needs, and what every backend and every kernel must do.

A backend computes one attention; autograd computes its gradients. A kernel computes a part of one: for some of the
heads it attends causally inside pieces, or to far keys. It writes into tensors that it is given, so that all parts
share one output and one set of gradients, and nothing is concatenated. `flash` and `aten` hold the kernels; `operators`
makes a backend from each; sequence's `halo` calls them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from peft_longlora.kernels.blocks import BlockPlan
    from peft_longlora.kernels.cuts import Cuts

HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """The options of one attention; its tensors and its cuts are given separately.

    Attributes:
        scaling: factor on the scores; None for D ** -0.5.
        dropout: probability at which attention weights are dropped.
        softcap: scores become softcap * tanh(scores / softcap) (gemma2); None or 0 for no softcap.
        sinks: (H,) learned logits that are added to the sum of every softmax (gpt_oss); None for no sinks.
        backend: one of `backends.BACKENDS`; None for the fastest.
    """

    scaling: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    backend: str | None = None

    def scale(self, dim: int) -> float:
        """The factor on the scores, for a head dim D."""
        return dim**-0.5 if self.scaling is None else self.scaling


@dataclass(frozen=True)
class Needs:
    """The needs of a call that a backend may lack.

    Attributes:
        is_grouped: H > H_kv. blocks: its pattern, if `blocks` has it. has_window: queries see their last keys only.
    """

    device: torch.device
    dtype: torch.dtype
    dim: int
    value_dim: int
    is_grouped: bool = False
    dropout: float = 0.0
    softcap: float = 0.0
    requires_grad: bool = False
    blocks: str | None = None
    has_window: bool = False


@dataclass(frozen=True)
class Pieces:
    """Where attention is cut; cu_seqlens is None for tensors of (pieces, tokens, heads, D), with pieces of one length.

    Without `far`, attention is causal among the tokens of a piece. With `far`, keys and values are those of other
    tokens, cut into the same number of pieces, and each query attends to all keys of its piece.

    With `window` a query sees only so many keys, itself included; 0 for all.
    """

    cu_seqlens: torch.Tensor | None
    max_length: int
    far: Pieces | None = None
    window: int = 0

    @property
    def is_causal(self) -> bool:
        """Whether keys belong to the queries' tokens, so that later keys are masked."""
        return self.far is None

    @property
    def keys(self) -> Pieces:
        """Where the keys are cut."""
        return self.far or self


class Backend:
    """One way to compute an attention, with its gradients.

    Attributes:
        name: the name that a user gives. install: how a user installs it.
    """

    name: str
    install: str = "it comes with PyTorch"

    def missing(self, device: torch.device) -> str | None:
        """Why this backend cannot run on a device at all, or None."""

    def lacks(self, needs: Needs) -> str | None:
        """What a call needs and this backend does not have, or None."""
        raise NotImplementedError

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cuts: Cuts, options: Options
    ) -> torch.Tensor:
        """Causal attention inside the groups: (B, H, S, D), (B, H_kv, S, D) -> (B, S, H, D_v), 0 at padding."""
        raise NotImplementedError

    def attend_blocks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, options: Options
    ) -> torch.Tensor:
        """The same for a pattern that sees blocks of keys."""
        raise NotImplementedError


class Kernel:
    """Attention that writes into given tensors. This class holds what all kernels share.

    A backward gets the out and lse of the whole softmax; its own keys may be only a part of it (`Pieces.far`).

    Tensors are (tokens, heads, D) with `Pieces.cu_seqlens`, or (pieces, tokens, heads, D) without; lse, the
    log-sum-exp of the scores, is (heads, tokens) or (pieces, heads, tokens), float32. All may be strided views.

    Attributes:
        name: the backend's name. install: how a user installs it.
        takes_pieces: whether it accepts cu_seqlens. takes_batches: whether it accepts a batch of pieces of one length.
        ties_layouts: whether its backward needs q, out and the gradient of out in the same memory layout.
        capabilities: the first and the last major compute capability that it runs on.
        most_dim: its largest head dim.
        has_softcap, has_window: whether it can do softcap, and a sliding window.
        may_differ: whether D_v may differ from D if H == H_kv.
    """

    name: ClassVar[str]
    install: ClassVar[str] = "it comes with PyTorch for CUDA"
    takes_pieces: ClassVar[bool] = True
    takes_batches: ClassVar[bool] = False
    ties_layouts: ClassVar[bool] = False
    capabilities: ClassVar[tuple[int, int]] = (8, 99)
    most_dim: ClassVar[int] = 256
    has_softcap: ClassVar[bool] = True
    has_window: ClassVar[bool] = True
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
        """The module that holds the kernel, or the reason why there is none."""

    def lacks(self, needs: Needs) -> str | None:
        """What a call needs and this kernel does not have, or None."""
        if needs.dtype not in HALF_TYPES:
            return f"it computes in float16 or bfloat16, not {needs.dtype}"
        if needs.dropout:
            return f"it is called without dropout here, and dropout={needs.dropout} was asked for"
        if needs.softcap and not self.has_softcap:
            return f"it has no softcap, and softcap={needs.softcap} was asked for"
        if needs.has_window and not self.has_window:
            return "it has no sliding window"
        for dim in (needs.dim, needs.value_dim):
            if dim % 8 or not 8 <= dim <= self.most_dim:
                return f"its head dim is a multiple of 8 up to {self.most_dim}, not {dim}"
        if needs.dim != needs.value_dim and (needs.is_grouped or not self.may_differ):
            rule = "if queries share KV heads, " if self.may_differ else ""
            return f"{rule}its value heads are as wide as its query heads, not {needs.value_dim} and {needs.dim}"
        return None

    def forward(self, q, k, v, out, lse, pieces: Pieces, scaling: float, softcap: float) -> None:
        """Fill out and lse."""
        raise NotImplementedError

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces: Pieces, scaling: float, softcap: float) -> None:
        """Fill dq, dk and dv. In PyTorch's deterministic mode every call gives the same bits."""
        raise NotImplementedError


def zero_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, S, H, D_v) zeros, for a call without a token that attends. Gradients of the tensors are 0."""
    return connect(query.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[3]), query, key, value)


def connect(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """Connect a constant to the inputs, so that their gradients are 0 (never NaN, whatever the inputs hold)."""
    everything = torch.ones((), dtype=torch.bool, device=out.device)
    return out + sum(x.masked_fill(everything, 0.0).sum() for x in inputs)


def is_deterministic() -> bool:
    """Whether `torch.use_deterministic_algorithms(True)` holds."""
    return torch.are_deterministic_algorithms_enabled()

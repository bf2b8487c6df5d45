"""The flash kernels: how each is found, what it can do, and how its own forward and backward are called.

A kernel here attends causally inside pieces, for one part of the heads, and writes into tensors that it is given: that
way the parts of the heads share one output and one set of gradients, and nothing is concatenated. `halves` calls them.
Nothing is imported from a kernel's package, and CUDA is not initialised, before the first call that needs it.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from functools import cache
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


@cache
def import_module(name: str) -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # an extension built for another torch raises more than ImportError
        return f"`import {name}` fails with {type(error).__name__}: {error}"


@cache
def download_kernel(name: str) -> ModuleType | str:
    """The interface of a flash kernel from the Hub, by transformers' own table and the `kernels` package."""
    try:
        from kernels import get_kernel
        from transformers.integrations.hub_kernels import get_attn_kernel_version
        from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

        repo = FLASH_ATTN_KERNEL_FALLBACK[name]
        return get_kernel(repo, version=get_attn_kernel_version(repo)).flash_attn_interface
    except Exception as error:
        return f"the Hub's kernel fails with {type(error).__name__}: {error}"


class PackagedKernel(Kernel):
    """A kernel of a package of its own, or the same from the Hub once `may_download` is set.

    Attributes:
        module: where its interface is.
        outdated: a function there, and an argument that only older interfaces than the one called here have.
    """

    module: ClassVar[str]
    outdated: ClassVar[tuple[str, str]] = ("", "")

    def __init__(self, may_download: bool = False):
        self.may_download = may_download

    def load(self) -> ModuleType | str:
        """The package's interface module, or why there is none."""
        found = import_module(self.module)
        if isinstance(found, str) and self.may_download:
            from_hub = download_kernel(self.name)
            return f"{found}, and {from_hub}" if isinstance(from_hub, str) else from_hub
        return found

    def missing(self, device: torch.device) -> str | None:
        """As `Kernel.missing`, or that the package is older than the interface that is called here."""
        if reason := super().missing(device):
            return reason
        function, argument = self.outdated
        call = getattr(self.load(), function, None)
        if call is not None and argument in inspect.signature(call).parameters:
            return f"the `{self.module}` that is installed is too old: its {function} takes {argument!r}"
        return None


def _cuts(pieces: Pieces) -> dict:
    return dict(
        cu_seqlens_q=pieces.cu_seqlens,
        cu_seqlens_k=pieces.keys.cu_seqlens,
        max_seqlen_q=pieces.max_length,
        max_seqlen_k=pieces.keys.max_length,
    )


class FlashAttention4(PackagedKernel):
    """flash-attn-4: CuTe kernels for Hopper and Blackwell, compiled at the first call of each kind."""

    name = "flash_attention_4"
    install = "pip install flash-attn-4"
    module = "flash_attn.cute.interface"
    takes_batches = True
    capabilities = (9, 11)
    may_differ = True

    def lacks(self, call: Call) -> str | None:
        """As `Kernel.lacks`; Blackwell's tensor memory holds heads up to 128."""
        if torch.cuda.get_device_capability(call.device)[0] > 9 and max(call.dim, call.value_dim) > 128:
            return f"its head dim is at most 128 on this GPU, not {call.dim}"
        return super().lacks(call)

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        """As `Kernel.forward`; the query heads of a KV head share a tile in short pieces only, where they fill it."""
        packs = None if pieces.max_length < 1024 else False
        more = dict(softmax_scale=scaling, softcap=softcap or None, out=out, lse=lse, pack_gqa=packs)
        self.load()._flash_attn_fwd(q, k, v, **self._where(pieces), **more)

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        """As `Kernel.backward`."""
        more = dict(softmax_scale=scaling, softcap=softcap, deterministic=is_deterministic())
        self.load()._flash_attn_bwd(q, k, v, out, dout, lse, dq=dq, dk=dk, dv=dv, **self._where(pieces), **more)

    @staticmethod
    def _where(pieces: Pieces) -> dict:
        cuts = {} if pieces.cu_seqlens is None else _cuts(pieces)
        return dict(causal=pieces.is_causal, **cuts)


class FlashAttention3(PackagedKernel):
    """FlashAttention-3 for Hopper."""

    name = "flash_attention_3"
    install = "pip install kernels, or build hopper/ of github.com/Dao-AILab/flash-attention"
    module = "flash_attn_interface"
    outdated = ("_flash_attn_forward", "out")
    capabilities = (9, 9)

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        """As `Kernel.forward`; a copy, because its operator declares that it writes into no input."""
        more = dict(softmax_scale=scaling, causal=pieces.is_causal, softcap=softcap)
        result = self.load()._flash_attn_forward(q, k, v, **_cuts(pieces), **more)
        out.copy_(result[0])
        lse.copy_(result[1])

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        """As `Kernel.backward`."""
        more = dict(softmax_scale=scaling, is_causal=pieces.is_causal, softcap=softcap)
        more.update(_cuts(pieces), deterministic=is_deterministic())
        self.load()._flash_attn_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **more)


def _fa2_cuts(pieces: Pieces) -> tuple:
    # Its forward lays out a longest piece of one token in another way, which its backward does not expect.
    keys = pieces.keys
    return pieces.cu_seqlens, keys.cu_seqlens, max(pieces.max_length, 2), max(keys.max_length, 2)


class FlashAttention2(PackagedKernel):
    """flash-attn 2.7 or newer, for Ampere and later."""

    name = "flash_attention_2"
    install = "pip install flash-attn --no-build-isolation, or pip install kernels"
    module = "flash_attn.flash_attn_interface"
    outdated = ("_flash_attn_varlen_forward", "window_size")

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        """As `Kernel.forward`."""
        cuts = _fa2_cuts(pieces)
        more = dict(causal=pieces.is_causal, softcap=softcap)
        result = self.load()._flash_attn_varlen_forward(q, k, v, *cuts, 0.0, scaling, **more)
        out.copy_(result[0])
        lse.copy_(result[1])

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        """As `Kernel.backward`."""
        cuts = _fa2_cuts(pieces)
        more = dict(causal=pieces.is_causal, softcap=softcap, alibi_slopes=None)
        more.update(window_size_left=-1, window_size_right=-1)
        self.load()._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq, dk, dv, *cuts, 0.0, scaling, **more, deterministic=is_deterministic()
        )


class TorchVarlen(Kernel):
    """The FlashAttention-2 kernels that PyTorch ships, with cumulative lengths (as in torch.nn.attention.varlen)."""

    name = "varlen"
    has_softcap = False

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        """As `Kernel.forward`."""
        cuts = _fa2_cuts(pieces)
        result = torch.ops.aten._flash_attention_forward(q, k, v, *cuts, 0.0, pieces.is_causal, False, scale=scaling)
        out.copy_(result[0])
        lse.copy_(result[1])

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        """As `Kernel.backward`; the operator itself asks whether PyTorch is in deterministic mode."""
        cuts = _fa2_cuts(pieces)
        no_dropout = torch.empty(0, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *cuts, 0.0, pieces.is_causal, no_dropout, no_dropout, scale=scaling
        )
        for grad, given in zip((dq, dk, dv), grads, strict=True):
            grad.copy_(given)


class CudnnAttention(Kernel):
    """cuDNN through PyTorch, for batches: on Hopper 1.7 times as fast as the FlashAttention-2 that PyTorch prefers."""

    name = "cudnn"
    takes_pieces = False
    takes_batches = True
    ties_layouts = True
    most_dim = 128
    has_softcap = False

    def lacks(self, call: Call) -> str | None:
        """As `Kernel.lacks`."""
        return "its backward is not deterministic" if is_deterministic() else super().lacks(call)

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        """As `Kernel.forward`."""
        if pieces.max_length == 1:  # cuDNN refuses it
            each = q.shape[2] // v.shape[2]
            out.copy_(v.repeat_interleave(each, dim=2))
            lse.copy_((q.float() * k.repeat_interleave(each, dim=2)).sum(3).transpose(1, 2) * scaling)
            return
        # (pieces, tokens, heads, D) -> (pieces, heads, tokens, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, pieces.is_causal, False, scale=scaling
        )
        out.copy_(result[0].transpose(1, 2))
        lse.copy_(result[1].view(lse.shape))

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        """As `Kernel.backward`."""
        if pieces.max_length == 1:
            each = q.shape[2] // v.shape[2]
            k, v = (x.repeat_interleave(each, dim=2).float() for x in (k, v))
            # 1, unless out and lse are of a softmax over more keys than this one
            weight = ((q * k).sum(3) * scaling - lse.transpose(1, 2)).exp()
            dscore = weight * (dout * (v - out)).sum(3) * scaling
            dq.copy_(dscore.unsqueeze(3) * k)
            for to, grad in ((dk, dscore.unsqueeze(3) * q), (dv, weight.unsqueeze(3) * dout)):
                to.copy_(grad.unflatten(2, (-1, each)).sum(3))
            return
        # PyTorch keeps cuDNN's backward plans by the dims and strides of q, k and v and by the dropout, and runs a plan
        # that it finds with the strides of out, dout and lse it was made for (ATen/native/cudnn/MHA.cpp). So those must
        # follow from q's: `ties_layouts` sees to out and dout, and lse is made dense. A dropout of -0.0 is none, and
        # keeps these plans apart from those of other callers, because the key is compared by its bytes.
        tensors = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        no_dropout, lengths = torch.zeros((), dtype=torch.int64, device=q.device), (q.shape[1], k.shape[1])
        more = None, None, None, *lengths, -0.0, pieces.is_causal  # no bias and no cumulative lengths
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, lse.contiguous().unsqueeze(-1), no_dropout, no_dropout, *more, scale=scaling
        )
        for grad, given in zip((dq, dk, dv), grads, strict=True):
            grad.copy_(given.transpose(1, 2))

"""The flash kernels of other packages: how each is found, and how its forward and backward are called.

A package is imported, and CUDA initialised, only at the first call that needs it. Called by
`operators` and by sequence's `halo`.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from types import ModuleType
from typing import ClassVar

import torch

from peft_longlora.kernels.kernel import Kernel, Needs, Pieces, is_deterministic


@cache
def import_module(name: str) -> ModuleType | str:
    """The module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # an extension built for another torch raises other errors too
        return f"`import {name}` fails with {type(error).__name__}: {error}"


@cache
def download_kernel(name: str) -> ModuleType | str:
    """The interface of a flash kernel from the Hub, found through transformers' own table and the `kernels` package."""
    try:
        from kernels import get_kernel
        from transformers.integrations.hub_kernels import get_attn_kernel_version
        from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

        repo = FLASH_ATTN_KERNEL_FALLBACK[name]
        return get_kernel(repo, version=get_attn_kernel_version(repo)).flash_attn_interface
    except Exception as error:
        return f"the Hub's kernel fails with {type(error).__name__}: {error}"


class PackagedKernel(Kernel):
    """A kernel of another package, or the same kernel from the Hub if `may_download` is set.

    Attributes:
        module: the module with its interface.
        outdated: a function of it, and an argument that this function has only in interfaces too old for this code.
    """

    module: ClassVar[str]
    outdated: ClassVar[tuple[str, str]] = ("", "")

    def __init__(self, may_download: bool = False):
        self.may_download = may_download

    def load(self) -> ModuleType | str:
        """The package's interface module, or the reason why there is none."""
        found = import_module(self.module)
        if isinstance(found, str) and self.may_download:
            from_hub = download_kernel(self.name)
            return f"{found}, and {from_hub}" if isinstance(from_hub, str) else from_hub
        return found

    def missing(self, device: torch.device) -> str | None:
        """As `Kernel.missing`; also a package whose interface is too old."""
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


def window_sizes(pieces: Pieces) -> dict[str, int]:
    """A sliding window as the flash kernels take it; nothing without one."""
    return dict(window_size_left=pieces.window - 1, window_size_right=0) if pieces.window else {}


class FlashAttention4(PackagedKernel):
    """flash-attn-4: CuTe kernels for Hopper and Blackwell, compiled at the first call of each kind."""

    name = "flash_attention_4"
    install = "pip install flash-attn-4"
    module = "flash_attn.cute.interface"
    takes_batches = True
    capabilities = (9, 11)
    may_differ = True

    def lacks(self, needs: Needs) -> str | None:
        """As `Kernel.lacks`; Blackwell's tensor memory holds heads up to 128."""
        if torch.cuda.get_device_capability(needs.device)[0] > 9 and max(needs.dim, needs.value_dim) > 128:
            return f"its head dim is at most 128 on this GPU, not {needs.dim}"
        return super().lacks(needs)

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        """As `Kernel.forward`. The query heads of a KV head share a tile only in short pieces, where they fill it."""
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
        return dict(causal=pieces.is_causal, **window_sizes(pieces), **cuts)


class FlashAttention3(PackagedKernel):
    """FlashAttention-3 for Hopper."""

    name = "flash_attention_3"
    install = "pip install kernels, or build hopper/ of github.com/Dao-AILab/flash-attention"
    module = "flash_attn_interface"
    outdated = ("_flash_attn_forward", "out")
    capabilities = (9, 9)

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        """As `Kernel.forward`. It copies, because the package's operator declares that it writes into no input."""
        more = dict(softmax_scale=scaling, causal=pieces.is_causal, softcap=softcap, **window_sizes(pieces))
        result = self.load()._flash_attn_forward(q, k, v, **_cuts(pieces), **more)
        out.copy_(result[0])
        lse.copy_(result[1])

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        """As `Kernel.backward`."""
        more = dict(softmax_scale=scaling, is_causal=pieces.is_causal, softcap=softcap, **window_sizes(pieces))
        more.update(_cuts(pieces), deterministic=is_deterministic())
        self.load()._flash_attn_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **more)


def fa2_cuts(pieces: Pieces) -> tuple:
    """The cuts of queries and keys as the functions of FlashAttention-2 take them, in its package and in PyTorch."""
    # If the longest piece has one token, its forward uses another layout, which its backward does not expect.
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
        cuts = fa2_cuts(pieces)
        more = dict(causal=pieces.is_causal, softcap=softcap, **window_sizes(pieces))
        result = self.load()._flash_attn_varlen_forward(q, k, v, *cuts, 0.0, scaling, **more)
        out.copy_(result[0])
        lse.copy_(result[1])

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, pieces, scaling, softcap):
        """As `Kernel.backward`."""
        cuts = fa2_cuts(pieces)
        more = dict(causal=pieces.is_causal, softcap=softcap, alibi_slopes=None)
        more.update(window_sizes(pieces) or dict(window_size_left=-1, window_size_right=-1))
        self.load()._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq, dk, dv, *cuts, 0.0, scaling, **more, deterministic=is_deterministic()
        )

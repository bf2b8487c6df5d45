"""Which backend runs a call: what is installed, what each backend lacks, and the fastest one that can run the call.

The choice is made at the first call of each kind, and logged with its reason. Called by `attend` and by sequence's
`halo`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers.utils import logging

from peft_longlora.kernels.flash_blocks import FlashBlocks
from peft_longlora.kernels.flex import Flex
from peft_longlora.kernels.kernel import Backend, Needs, Options
from peft_longlora.kernels.operators import KERNELS, Launched
from peft_longlora.kernels.sdpa import Sdpa

logger = logging.get_logger(__name__)

# All but the kernel for CPUs, which only sequence parallelism needs.
BACKENDS: dict[str, Backend] = {name: Launched(kernel) for name, kernel in KERNELS.items() if name != "cpu"}
BACKENDS["flash_attention_4"] = FlashBlocks(KERNELS["flash_attention_4"])
BACKENDS |= {backend.name: backend for backend in (Sdpa(), Flex())}


def check_backend(backend: str | None) -> None:
    """Refuse an unknown backend. Raises: ValueError."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown. Use None or one of {', '.join(map(repr, BACKENDS))}.")


def windowed(backend: str | None) -> str | None:
    """The backend for a layer with a sliding window: the named one, or None if that has no windows."""
    return None if backend in KERNELS and not KERNELS[backend].has_window else backend


def pick_backend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_regular: bool,
    options: Options,
    blocks: str | None = None,
    has_window: bool = False,
) -> Backend:
    """The backend for a call on these tensors; `blocks`: as in `Needs`. Errors as `choose_backend`."""
    needs = _needs(query, key, value, options)
    return BACKENDS[choose_backend(options.backend, is_regular, *needs, blocks, has_window)]


def _needs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> tuple:
    """The fields of `Needs`, one by one."""
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    shape = query.shape[3], value.shape[3], query.shape[1] > key.shape[1]
    # torch.compile keeps a 0.0 as a symbol; `or` makes it a constant.
    numbers = options.dropout or 0.0, options.softcap or 0.0
    return query.device, query.dtype, *shape, *numbers, needs_grad


@torch.compiler.assume_constant_result
def choose_backend(backend: str | None, is_regular: bool, *needs) -> str:
    """The name of a call's backend, chosen once for each kind of call.

    Args:
        backend: a name, or None for the fastest one that is installed and can run the call.
        is_regular: whether the pieces have few different lengths.
        needs: the fields of `Needs`, one by one (torch.compile takes only constants).

    Raises:
        ValueError: the named backend is not available. NotImplementedError: it cannot run this call.
    """
    return _choose(backend, is_regular, torch.are_deterministic_algorithms_enabled(), Needs(*needs))


@lru_cache(maxsize=256)
def _choose(backend: str | None, is_regular: bool, is_deterministic: bool, needs: Needs) -> str:
    if backend is not None:
        return _force(backend, needs)
    passed = []
    for name in _order(needs.device, is_regular, needs.blocks is not None):
        reason = BACKENDS[name].missing(needs.device) or BACKENDS[name].lacks(needs)
        if reason is None:
            why = ": " + "; ".join(passed) if passed else ", the fastest here"
            _log_once(f"S2-Attn runs on backend {name!r} ({needs.device.type}){why}.")
            return name
        passed.append(f"not {name}: {reason}")
    raise NotImplementedError(f"No backend can run this call: {'; '.join(passed)}.")


@lru_cache(maxsize=64)
def _log_once(message: str) -> None:
    logger.info(message)


def _force(name: str, needs: Needs) -> str:
    """The named backend, or an error that says what to install or to use.

    Raises: ValueError, NotImplementedError.
    """
    backend = BACKENDS[name]
    reason = backend.missing(needs.device)
    if reason and needs.device.type == "cuda" and name in ("flash_attention_2", "flash_attention_3"):
        KERNELS[name].may_download = True  # only if the user named it
        reason = backend.missing(needs.device)
    if reason:
        cure = backend.install if needs.device.type == "cuda" else "use backend=None or 'sdpa' on this device"
        raise ValueError(f"backend={name!r} is not available: {reason}. To get it: {cure}.")
    if reason := backend.lacks(needs):
        raise NotImplementedError(f"backend={name!r} cannot run this call: {reason}. Use backend=None.")
    return name


def _order(device: torch.device, is_regular: bool, has_blocks: bool) -> list[str]:
    """Backends from the fastest to the slowest on this device, whether installed or not."""
    if has_blocks and device.type == "cuda":
        return ["flash_attention_4", "flex", "sdpa"]
    if device.type != "cuda":
        return ["sdpa", "flex"]
    if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9:
        fast = ["flash_attention_4", "flash_attention_3", "cudnn", "flash_attention_2", "varlen"]
        # cuDNN builds a plan for each new length. If documents differ in every step, this costs more than it saves.
        return [*(x for x in fast if x != "cudnn" or is_regular), "sdpa", "flex"]
    return ["flash_attention_2", "varlen", "sdpa", "flex"]


def pick_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_regular: bool, options: Options) -> str:
    """The name of a kernel, for a caller that calls its forward and its backward separately.

    Raises: ValueError: the named backend is not available. NotImplementedError: no kernel can run this call.
    """
    if query.device.type != "cpu":
        name = pick_backend(query, key, value, is_regular, options).name
    else:
        name = "cpu" if options.backend in (None, "sdpa") else options.backend
        reason = KERNELS["cpu"].lacks(Needs(*_needs(query, key, value, options)))
        if name == "cpu" and reason:
            raise NotImplementedError(f"No kernel can run this call on the CPU: {reason}.")
    if name not in KERNELS or KERNELS[name].missing(query.device):
        raise NotImplementedError(
            f"backend={name!r} cannot attend to a sequence that ranks share: this needs a kernel whose forward and "
            f"backward can be called separately. Use backend=None, and on a GPU float16 or bfloat16."
        )
    return name

"""Which kernel runs a call: what is installed, what each lacks, and the fastest of those that can.

Found once for each kind of call, at the first one, and logged with its reason. Called by `kernels` and `settings`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from peft_longlora.kernels import flex
from peft_longlora.kernels.aten import CpuAttention, CudnnAttention, TorchVarlen
from peft_longlora.kernels.flash import FlashAttention2, FlashAttention3, FlashAttention4
from peft_longlora.kernels.kernel import Call, Kernel

logger = logging.get_logger(__name__)

BACKENDS = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "cudnn", "sdpa", "flex")


def check_backend(backend: str | None) -> None:
    """Refuse an unknown backend. Raises: ValueError."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown. Use None or one of {', '.join(map(repr, BACKENDS))}.")


def check_model(config: PreTrainedConfig, layers: Iterable[nn.Module], backend: str | None) -> None:
    """Refuse, before anything runs, a model whose attention needs what the backend cannot do.

    Raises: NotImplementedError. ValueError: an unknown backend.
    """
    check_backend(backend)
    if any(hasattr(module, "sinks") for module in layers):
        raise NotImplementedError(
            "This model's attention has sinks, which no backend of S2-Attn can do. Use another model."
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None and backend in ("sdpa", "cudnn", "varlen"):
        raise NotImplementedError(
            f"This model's attention has softcap={softcap}, which the backend {backend!r} cannot do. Use None, 'flex' "
            f"or a flash_attention backend, or another model."
        )


def lacks(name: str, call: Call) -> str | None:
    """What a call needs and a backend does not have, or None."""
    if name == "flex":
        return flex.lacks(call)
    if name == "sdpa":
        needs = {"softcap": call.softcap, "attention sinks": call.has_sinks}
        return next((f"it has no {what}" for what, is_wanted in needs.items() if is_wanted), None)
    return KERNELS[name].lacks(call)


def missing(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device at all, or None."""
    return KERNELS[name].missing(device) if name in KERNELS else None


def _force(name: str, call: Call) -> str:
    """The backend asked for, or an error that says what to install or to use.

    Raises: ValueError, NotImplementedError.
    """
    reason = missing(name, call.device)
    if reason and call.device.type == "cuda" and name in ("flash_attention_2", "flash_attention_3"):
        KERNELS[name].may_download = True  # only when it is asked for by name
        reason = missing(name, call.device)
    if reason:
        cure = KERNELS[name].install if call.device.type == "cuda" else "use backend=None or 'sdpa' on this device"
        raise ValueError(f"backend={name!r} is not available: {reason}. To get it: {cure}.")
    if reason := lacks(name, call):
        raise NotImplementedError(f"backend={name!r} cannot run this call: {reason}. Use backend=None.")
    return name


def _order(device: torch.device, is_regular: bool) -> list[str]:
    """Backends from the fastest to the slowest on this device, whether installed or not."""
    if device.type != "cuda":
        return ["sdpa", "flex"]
    if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9:
        fast = ["flash_attention_4", "flash_attention_3", "cudnn", "flash_attention_2", "varlen"]
        # cuDNN builds a plan for each new length, which takes longer than it saves if documents differ every step.
        return [*(x for x in fast if x != "cudnn" or is_regular), "sdpa", "flex"]
    return ["flash_attention_2", "varlen", "sdpa", "flex"]


@torch.compiler.assume_constant_result
def choose_backend(backend: str | None, is_regular: bool, *call) -> str:
    """The backend of a call, found out once for each kind of call.

    Args:
        backend: a name, or None for the fastest that is installed and can do it.
        is_regular: whether the pieces have few different lengths.
        call: the fields of `interface.Call`, one by one (torch.compile takes constants only).

    Raises:
        ValueError: the backend asked for is not available. NotImplementedError: it cannot run this call.
    """
    return _choose(backend, is_regular, torch.are_deterministic_algorithms_enabled(), Call(*call))


@lru_cache(maxsize=256)
def _choose(backend: str | None, is_regular: bool, is_deterministic: bool, call: Call) -> str:
    if backend is not None:
        return _force(backend, call)
    passed = []
    for name in _order(call.device, is_regular):
        reason = missing(name, call.device) or lacks(name, call)
        if reason is None:
            _log_choice(name, call.device.type, "; ".join(passed))
            return name
        passed.append(f"not {name}: {reason}")
    raise NotImplementedError(f"No backend can run this call: {'; '.join(passed)}.")


@lru_cache(maxsize=64)
def _log_choice(name: str, device: str, passed: str) -> None:
    logger.info(f"S2-Attn runs on backend {name!r} ({device}){': ' + passed if passed else ', the fastest here'}.")


def pick_backend(query, key, value, is_regular, dropout, backend, softcap=0.0, has_sinks=False) -> str:
    """The backend of a call on these tensors; arguments and errors as `choose_backend`."""
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    shape = query.shape[3], value.shape[3], query.shape[1] > key.shape[1]
    # `or` makes a constant of a 0.0 that torch.compile keeps as a symbol.
    call = query.device, query.dtype, *shape, dropout or 0.0, softcap or 0.0, has_sinks, needs_grad
    return choose_backend(backend, is_regular, *call)


def pick_kernel(query, key, value, is_regular, dropout, backend, softcap=0.0, has_sinks=False) -> str:
    """The backend, one of `halves.KERNELS`, where a forward and a backward are called by themselves.

    Raises: ValueError: the backend asked for is not available. NotImplementedError: no kernel can run this call.
    """
    if query.device.type != "cpu":
        name = pick_backend(query, key, value, is_regular, dropout, backend, softcap, has_sinks)
    else:
        name = "cpu" if backend in (None, "sdpa") else backend
        dims = query.shape[3], value.shape[3], query.shape[1] > key.shape[1]
        reason = KERNELS["cpu"].lacks(Call(query.device, query.dtype, *dims, dropout, softcap, has_sinks))
        if name == "cpu" and reason:
            raise NotImplementedError(f"No kernel can run this call on the CPU: {reason}.")
    if name not in KERNELS or KERNELS[name].missing(query.device):
        raise NotImplementedError(
            f"backend={name!r} cannot attend to a sequence that ranks share, which needs a kernel whose forward and "
            f"backward can be called apart. Use backend=None, and on a GPU float16 or bfloat16."
        )
    return name


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        FlashAttention4(),
        FlashAttention3(),
        FlashAttention2(),
        TorchVarlen(),
        CudnnAttention(),
        CpuAttention(),
    )
}

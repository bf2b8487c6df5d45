"""`s2_attention`, and the choice of the kernel that runs it.

Called by `attention` with a plan made once a forward, and by users with segment ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from peft_longlora import flex, sdpa
from peft_longlora.flash import Call
from peft_longlora.groups import PATTERNS, Groups, plan_from_segment_ids
from peft_longlora.halves import KERNELS, attend_halves, plan, regular_groups

logger = logging.get_logger(__name__)

BACKENDS = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "cudnn", "sdpa", "flex")


def check_pattern(group_size: int, pattern: str) -> None:
    """Refuse a group size that cannot be shifted by half, and an unknown pattern.

    Raises: ValueError.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r} is unknown. Use one of {', '.join(map(repr, PATTERNS))}.")
    if not isinstance(group_size, int) or group_size < 2 or group_size % 2:
        raise ValueError(
            f"group_size={group_size!r} cannot be used: it must be an even number of tokens, 2 or more, because "
            f"shifted heads move their groups by half of it."
        )


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


def _lacks(name: str, call: Call) -> str | None:
    if name == "flex":
        return flex.lacks(call)
    if name == "sdpa":
        lacks = {"softcap": call.softcap, "attention sinks": call.has_sinks}
        return next((f"it has no {what}" for what, is_wanted in lacks.items() if is_wanted), None)
    return KERNELS[name].lacks(call)


def _missing(name: str, device: torch.device) -> str | None:
    return KERNELS[name].missing(device) if name in KERNELS else None


def _force(name: str, call: Call) -> str:
    """The backend asked for, or an error that says what to install or to use.

    Raises: ValueError, NotImplementedError.
    """
    reason = _missing(name, call.device)
    if reason and call.device.type == "cuda" and name in ("flash_attention_2", "flash_attention_3"):
        KERNELS[name].may_download = True  # only when it is asked for by name
        reason = _missing(name, call.device)
    if reason:
        cure = KERNELS[name].install if call.device.type == "cuda" else "use backend=None or 'sdpa' on this device"
        raise ValueError(f"backend={name!r} is not available: {reason}. To get it: {cure}.")
    if reason := _lacks(name, call):
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
        call: the fields of `flash.Call`, one by one (torch.compile takes constants only).

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
        reason = _missing(name, call.device) or _lacks(name, call)
        if reason is None:
            _log_choice(name, call.device.type, "; ".join(passed))
            return name
        passed.append(f"not {name}: {reason}")
    raise NotImplementedError(f"No backend can run this call: {'; '.join(passed)}.")


@lru_cache(maxsize=64)
def _log_choice(name: str, device: str, passed: str) -> None:
    logger.info(f"S2-Attn runs on backend {name!r} ({device}){': ' + passed if passed else ', the fastest here'}.")


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Refuse tensors that do not fit together. Raises: ValueError."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if any(x.dim() != 4 for x in (query, key, value)):
        raise ValueError(f"{shapes}: each must have 4 dimensions, (B, H, S, D).")
    batch, heads, length, dim = query.shape
    if key.shape[:3] != value.shape[:3] or (key.shape[0], key.shape[2], key.shape[3]) != (batch, length, dim):
        raise ValueError(
            f"{shapes}: key and value must be (B, H_kv, S, D) with the B, S and D of query; only value may differ in "
            f"D. S2-Attn is for whole sequences: attend densely where a cache makes keys longer than queries."
        )
    if not key.shape[1] or heads % key.shape[1]:
        raise ValueError(f"{shapes}: {heads} query heads cannot be shared out to {key.shape[1]} KV heads evenly.")
    if len({x.device for x in (query, key, value)}) > 1:
        raise ValueError(f"query, key and value are on {query.device}, {key.device} and {value.device}: move them.")
    if not all(x.is_floating_point() for x in (query, key, value)):
        raise ValueError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}: use floating point.")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: Groups,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention by a ready plan: (B, H, S, D), (B, H_kv, S, D) -> (B, S, H, D_v).

    Args:
        softcap: scores become softcap * tanh(scores / softcap) (gemma2); None for none.
        sinks: (H,) learned logits that every softmax also sums over (gpt_oss); None for none.

    Raises:
        ValueError: tensors that do not fit together, or a backend that is unknown or not available.
        NotImplementedError: the backend cannot run this call.
    """
    check_backend(backend)
    _check_tensors(query, key, value)
    device, batch, heads, length = query.device, *query.shape[:3]
    if (groups.batch, groups.length) != (batch, length):
        raise ValueError(f"The plan is for {(groups.batch, groups.length)} (B, S), the query has {(batch, length)}.")
    query, key, value = _cast(query, key, value)
    if not query.numel() or not value.numel():
        return query.new_zeros(batch, length, heads, value.shape[-1]) + query.sum() + key.sum() + value.sum()
    softcap = softcap or 0.0
    name = _pick(query, key, value, groups.is_regular, dropout, backend, softcap, sinks is not None)
    if name == "sdpa":
        return sdpa.attend_groups(query, key, value, groups, scaling=scaling, dropout=dropout)
    if name == "flex":
        return flex.attend_flex(query, key, value, groups, scaling=scaling, softcap=softcap)
    return _attend_halves(query, key, value, *groups.tensors(device), scaling, softcap, name)


def _cast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """To autocast's dtype, or an error if dtypes are mixed without it."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
    if len({x.dtype for x in tensors}) > 1:
        raise ValueError(f"query, key and value are {', '.join(str(x.dtype) for x in tensors)}: use one dtype.")
    return tensors


def _pick(query, key, value, is_regular, dropout, backend, softcap=0.0, has_sinks=False) -> str:
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    shape = query.shape[3], value.shape[3], query.shape[1] > key.shape[1]
    call = query.device, query.dtype, *shape, dropout, softcap, has_sinks, needs_grad
    return choose_backend(backend, is_regular, *call)


def _attend_halves(query, key, value, layout, cu_seqlens, scaling, softcap, name) -> torch.Tensor:
    batch, heads, length, dim = query.shape
    # (B, H, S, D) -> (B * S, H, D); a view of what a projection gives
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out, _ = attend_halves(q, k, v, layout, cu_seqlens, dim**-0.5 if scaling is None else scaling, softcap, name)
    return out.view(batch, length, heads, value.shape[3])


def attend_causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Dense causal attention through the fastest kernel, which PyTorch's own choice is not on Hopper.

    Args:
        query: (B, H, S, D). key, value: (B, H_kv, T, D), T >= S: the last query sees every key (prefill, decoding).
        scaling, dropout, backend: as in `s2_attention`.

    Returns: (B, S, H, D_v).

    Raises: as `s2_attention`.
    """
    length, keys = query.shape[2], key.shape[2]
    if length == keys:
        groups = regular_groups(query.shape[0], length, 2, "full")
        return attend(query, key, value, groups, scaling=scaling, dropout=dropout, backend=backend)
    check_backend(backend)
    mask = None
    if length > 1:  # the lower right triangle of (S, T)
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2)


def s2_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group_size: int,
    *,
    segment_ids: torch.Tensor | None = None,
    pattern: str = "s2",
    scaling: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Shifted sparse attention: causal attention inside groups, which half of the heads cut half a group later.

    Args:
        query: (B, H, S, D) floating point.
        key, value: (B, H_kv, S, D), H divisible by H_kv; value may have another last size.
        group_size: G, tokens; even, 2 or more. A document of at most G tokens is attended to densely.
        segment_ids: (B, S) int: 0 = padding, a run of one positive number = one document. None: each row is one.
        pattern: "s2"; "local" (no head is shifted); "full" (dense inside each document).
        scaling: factor on the scores; None for D ** -0.5.
        dropout: probability at which attention weights are dropped.
        backend: one of `BACKENDS`; None for the fastest there is.

    Returns:
        (B, S, H, D), dtype of query; exactly 0 at padding.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an odd or too small group_size, an unknown
            pattern or backend.

    Source: LongLoRA, arXiv:2309.12307, section 3.2; the groups are those of the original's flash path, which never
    wrap around, so that no token sees a later one.

    Example: 10 tokens, G = 4: straight heads [0,4) [4,8) [8,10); shifted heads [0,2) [2,6) [6,10).
    """
    check_pattern(group_size, pattern)
    _check_tensors(query, key, value)
    batch, _, length, _ = query.shape
    if segment_ids is not None:
        _check_segment_ids(segment_ids, batch, length)
    if torch.compiler.is_compiling():
        check_backend(backend)
        q, k, v = _cast(query, key, value)
        name = _pick(q, k, v, False, dropout, backend)
        if name in KERNELS:
            tensors = plan(segment_ids, batch, length, group_size, pattern, q.device)
            return _attend_halves(q, k, v, *tensors, scaling, 0.0, name)
    if segment_ids is None:
        groups = regular_groups(batch, length, group_size, pattern)
    else:
        groups = plan_from_segment_ids(segment_ids, group_size, pattern)
    return attend(query, key, value, groups, scaling=scaling, dropout=dropout, backend=backend)


def _check_segment_ids(segment_ids: torch.Tensor, batch: int, length: int) -> None:
    if tuple(segment_ids.shape) != (batch, length):
        raise ValueError(f"segment_ids has shape {tuple(segment_ids.shape)}: it must be (B, S) = {(batch, length)}.")
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise ValueError(f"segment_ids is {segment_ids.dtype}: it must hold integers, 0 at padding.")

"""Checks of what a call says about its rows: the documents' cumulative lengths, and the padding mask.

Called by `inputs` at the start of a call, and by sequence's `batch` before rows are cut.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

# What collators tell kernels that take cumulative lengths about the documents of a whole row.
OF_WHOLE_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_CURE = (
    "Give one-dimensional integer tensors cu_seq_lens_q and cu_seq_lens_k of equal numbers, as transformers' "
    "DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes them, or position_ids that restart where a "
    "document starts."
)


def check_lengths(queries: Any, keys: Any, batch: int, length: int) -> None:
    """Refuse cumulative lengths that do not say where the documents of a batch are. Nothing is done without any.

    Args:
        queries, keys: cu_seq_lens_q and cu_seq_lens_k, (documents + 1) integers each, over the B * S flattened tokens;
            either may be None.
        batch, length: B and S, tokens.

    Raises:
        ValueError: not one-dimensional integers; do not begin at 0; fall; do not end at B * S; a document lies in
            two rows; the two differ, or there are only those of the keys.
    """
    if queries is None and keys is None:
        return
    queries, keys = _on_host(queries, None if keys is queries else keys)
    if queries is None:
        raise ValueError(f"cu_seq_lens_k={_short(keys)} is given without cu_seq_lens_q. {_CURE}")
    for name, given in (("cu_seq_lens_q", queries), ("cu_seq_lens_k", keys)):
        if given is not None and (broken := _broken_rule(given, batch, length)):
            raise ValueError(f"{name}={_short(given)} {broken}. {_CURE}")
    if keys is not None and keys.tolist() != queries.tolist():
        raise ValueError(
            f"cu_seq_lens_q={_short(queries)} and cu_seq_lens_k={_short(keys)} differ: without a cache every document "
            f"has as many keys as queries. {_CURE}"
        )


def _on_host(queries: Any, keys: Any) -> tuple[Any, Any]:
    """Both on the CPU. If they are alike, as collators make them, the device is waited for once and not twice."""
    both = queries, keys
    kinds = {(x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else None for x in both}
    if len(kinds) == 1 and None not in kinds:
        return tuple(torch.stack(both).cpu())
    return tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in both)


def _broken_rule(given: Any, batch: int, length: int) -> str | None:
    if not isinstance(given, torch.Tensor) or given.dim() != 1:
        return "must be a tensor of one dimension"
    if given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        return f"must hold integers, not {given.dtype}"
    ends = given.tolist()
    if not ends or ends[0] != 0:
        return "must begin at 0"
    if any(after < before for before, after in pairwise(ends)):
        return "must not fall: each number is the end of a document"
    if ends[-1] != batch * length:
        return f"must end at {batch * length}, the number of tokens in {batch} x {length}"
    if missing := sorted(set(range(0, batch * length, length or 1)) - set(ends)):
        return f"must hold {missing[0]}, where a row of {length} tokens begins: a document lies in one row"
    return None


def _short(given: Any) -> str:
    """A value in a message: at most its first six numbers."""
    if not isinstance(given, torch.Tensor):
        return repr(given)[:80]
    if given.dim() != 1:
        return f"<{given.dtype} of shape {tuple(given.shape)}>"
    numbers = given.tolist()
    return str(numbers) if len(numbers) <= 6 else f"[{', '.join(map(str, numbers[:5]))}, ..., {numbers[-1]}]"


def check_padding(mask: Any, batch: int, length: int) -> None:
    """Refuse a two-dimensional attention_mask that does not hold one number for each token.

    Raises: ValueError.
    """
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the model is given {batch} rows of {length} tokens. "
            f"Give one number for each token (1 = token, 0 = padding), or leave attention_mask out."
        )


def check_numbers_of_documents(mask: Any, seq_idx: Any, has_documents: bool) -> None:
    """Refuse documents that are numbered in attention_mask or seq_idx: transformers reads neither as documents.

    It takes any number in a mask but 0 for a token, and its attention knows no seq_idx. Other programs replace its
    attention for such masks; here documents would see each other.

    Args:
        has_documents: whether position_ids or cumulative lengths are given.

    Raises: ValueError.
    """
    cure = "Give position_ids that restart where a document starts"
    is_numbers = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.dtype != torch.bool
    if is_numbers and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"attention_mask holds numbers other than 0 and 1 (up to {mask.max().item():g}). If they number the "
            f"documents of packed rows, transformers does not read them, and documents would see each other. {cure}, "
            f"and 1 for each token in attention_mask."
        )
    if seq_idx is not None and not has_documents:
        raise ValueError(
            f"seq_idx is given without position_ids or cu_seq_lens_q. Attention does not read it, so documents would "
            f"see each other. {cure}, as DataCollatorWithFlattening(return_seq_idx=True) does."
        )


def check_restarts(position_ids: torch.Tensor | None, ends: torch.Tensor | None, batch: int, length: int) -> None:
    """Refuse positions that begin a document (0, 1) inside a document of the cumulative lengths.

    Positions that skip, go on into the next document, or are 0 for padding say nothing about documents.

    Args:
        position_ids: (1 or B, S). ends: cu_seq_lens_q, which `check_lengths` has taken.

    Raises: ValueError.
    """
    if position_ids is None or ends is None or position_ids.dim() != 2 or position_ids.shape[1] != length:
        return
    positions = position_ids.expand(batch, -1)
    begins = torch.zeros(batch, length, dtype=torch.bool, device=positions.device)
    begins[:, :-1] = (positions[:, :-1] == 0) & (positions[:, 1:] == 1)
    begins = begins.flatten()
    begins[ends[ends < len(begins)].to(positions.device, torch.long)] = False
    if found := begins.nonzero()[:1].flatten().tolist():
        raise ValueError(
            f"position_ids begin a document at token {found[0]}, and cu_seq_lens_q={_short(ends)} does not: they "
            f"contradict each other. Give both the same documents, or leave one of them out."
        )

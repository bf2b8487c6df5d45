"""The sliding window or the chunks that a layer has of its own, as cuts that every kernel can run.

transformers describes them by a rule on indices. It is evaluated at the borders only, so memory is O(S). A rule that is
neither a window nor chunks is left to dense attention with transformers' own mask. Called by `layer`, `caution`
and sequence's `layer`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from peft_longlora.attention.mask import S2Mask
from peft_longlora.kernels.cuts import Cuts


class Local(NamedTuple):
    """Which keys of its document a query sees: the last `size`, itself included; or those of its chunk of `size`."""

    kind: Literal["window", "chunks"]
    size: int


def documents_of(mask: S2Mask) -> S2Mask:
    """The mask of the same tokens that knows padding, and documents only from positions."""
    names = ("batch_size", "q_length", "kv_length", "device", "attention_mask")
    return S2Mask({name: mask.arguments.get(name) for name in names})


@torch.compiler.disable
def find_local(mask: S2Mask, positions: torch.Tensor | None, has_chunks: bool = False) -> Local | None:
    """What a layer sees, from its mask; None if its rule is another, or if padding stands inside a document.

    Args:
        positions: (1 or B, S), restarting where a document starts, or None.
        has_chunks: what to answer if both fit, as in rows that are no longer than the size. That matters where the rows
            are stretches of a sequence that ranks share: its documents may be longer.
    """
    size, rule = mask.arguments.get("local_size"), mask.arguments.get("mask_function")
    if size is None or rule is None or not mask.is_causal or mask.arguments["kv_length"] != mask.length:
        return None
    plain = documents_of(mask)
    if not mask.length or not mask.batch or plain.order(positions) is not None:
        return None
    ids = plain.segment_ids(positions)
    row = torch.arange(mask.batch, device=ids.device)[:, None]
    here = torch.arange(mask.length, device=ids.device).expand(mask.batch, -1)
    is_start = torch.ones_like(ids, dtype=torch.bool)
    is_start[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = here - here.where(is_start, 0).cummax(1).values
    left = (ids == 0).cumprod(1).sum(1, keepdim=True)  # padding on the left, which chunks do not count

    def sees(back: int) -> torch.Tensor:
        return rule(row, 0, here, (here - back).clamp(0, mask.length - 1))

    no_later = ~(sees(-1) & (here < mask.length - 1))
    window = sees(1) | (place < 1)
    window &= (sees(size - 1) | (place < size - 1)) & (~sees(size) | (place < size))

    def chunks(count: torch.Tensor) -> torch.Tensor:
        begins = (sees(1) == (count % size > 0)) | (place < 1)
        return begins & (sees(size - 1) | (place < size - 1) | (count % size < size - 1))

    # transformers counts chunks from the start of a document if its rule knows documents, and of the row if not.
    found = torch.stack([((x & no_later) | (ids == 0)).all() for x in (window, chunks(place), chunks(here - left))])
    is_window, *is_chunks = found.tolist()
    if any(is_chunks) and (has_chunks or not is_window):
        return Local("chunks", size)
    return Local("window", size) if is_window else None


def cuts_of(mask: S2Mask, positions: torch.Tensor | None, local: Local) -> Cuts:
    """The cuts of a layer with a window or chunks. Chunks are counted from the start of each document."""
    plain = documents_of(mask)
    if local.kind == "chunks":
        return Cuts.of(plain.groups(local.size, "local", positions))
    return Cuts.of(plain.groups(2, "full", positions), local.size)

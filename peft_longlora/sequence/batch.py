"""A rank's stretch of a batch that every rank holds, and the check that all hold the same batch. Called by
`trainer`."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from peft_longlora.attention.lengths import OF_WHOLE_ROWS, check_lengths
from peft_longlora.data.records import IGNORED
from peft_longlora.kernels.groups import positions_in_documents
from peft_longlora.sequence.edges import gather

CHECKSUM = "batch_checksum"


def shard_batch(batch: dict[str, Any], rank: int, ranks: int, *, pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """This rank's stretch of a batch that every rank holds.

    The rows are laid end to end, padded to a multiple of `ranks`, and cut. So a rank gets one row, and the positions
    show where documents start. Labels are shifted before they are cut: a rank's last token predicts the next rank's
    first.

    Args:
        batch: input_ids (B, S) and, if present, attention_mask, position_ids, labels and others of that shape.
        rank: the number of this stretch.
        ranks: the number of stretches.
        pad_token_id: the token that fills up the last stretch.

    Returns: input_ids, attention_mask, position_ids and, if there are labels, labels and shift_labels; (1, S') each.

    Raises: ValueError: a part of the batch does not hold one number for each token, or cumulative lengths do not fit.

    Example: one row of 5 tokens on 2 ranks: tokens 0 to 2, and 3, 4 and one of padding.
    """
    ids = batch["input_ids"]
    rows = {"attention_mask": torch.ones_like(ids), **batch}
    check_lengths(rows.get("cu_seq_lens_q"), rows.get("cu_seq_lens_k"), *ids.shape)
    if rows.get("cu_seq_lens_q") is not None:
        rows["position_ids"] = positions_in_documents(rows["cu_seq_lens_q"].to(ids.device), *ids.shape)
    for name in OF_WHOLE_ROWS:  # positions say it, which can be cut
        rows.pop(name, None)
    if rows.get("position_ids") is None:
        rows["position_ids"] = torch.arange(ids.shape[1], device=ids.device)
    rows["position_ids"] = rows["position_ids"].expand(ids.shape)
    if rows.get("labels") is not None and rows.get("shift_labels") is None:
        rows["shift_labels"] = nn.functional.pad(rows["labels"][:, 1:], (0, 1), value=IGNORED)
    wrong = [name for name, x in rows.items() if not isinstance(x, torch.Tensor) or x.shape != ids.shape]
    if wrong:
        raise ValueError(
            f"{wrong} of the batch cannot be cut into stretches: only (B, S) = {tuple(ids.shape)} can. Leave them out."
        )
    length = -(-ids.numel() // ranks)
    fill = {"input_ids": pad_token_id, "labels": IGNORED, "shift_labels": IGNORED}
    stretch = {}
    for name, x in rows.items():
        flat = x.reshape(-1)[rank * length : (rank + 1) * length]
        stretch[name] = nn.functional.pad(flat, (0, length - len(flat)), value=fill.get(name, 0))[None]
    return stretch


class SequenceCollator:
    """A collator that cuts the batches of `collator`, and keeps this rank's stretch.

    Args:
        collator: makes a batch of PyTorch tensors. rank, ranks, pad_token_id: as `shard_batch`.
    """

    def __init__(self, collator: Callable[[Any], dict[str, Any]], rank: int, ranks: int, pad_token_id: int = 0):
        self.collator, self.rank, self.ranks, self.pad_token_id = collator, rank, ranks, pad_token_id

    def __call__(self, features: Any) -> dict[str, torch.Tensor]:
        """The stretch of this rank, and a checksum of the whole batch."""
        batch = self.collator(features)
        ids = batch["input_ids"]
        checksum = torch.tensor([[*ids.shape, zlib.crc32(ids.contiguous().numpy().tobytes())]])
        return {**shard_batch(batch, self.rank, self.ranks, pad_token_id=self.pad_token_id), CHECKSUM: checksum}


def check_same(checksum: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Compare the ranks' checksums (1, 3) of `SequenceCollator`. Raises: ValueError, on all ranks: they differ."""
    found = torch.cat(gather(checksum, group)).tolist()
    if any(one != found[0] for one in found):
        raise ValueError(
            f"The ranks that share a sequence were given different batches: (rows, tokens a row, checksum) = "
            f"{[tuple(one) for one in found]}. Give every rank the same dataset, in the same order (the same seed)."
        )

"""Batches to share out among ranks: padded on either side, packed, shorter than the ranks are many."""

import torch

from peft_longlora.data.records import IGNORED


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 53), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if kind == "padded right":
        mask[0, 20:] = 0
    elif kind == "padded left":
        mask[0, :30] = 0
        mask[1, :1] = 0
    elif kind == "packed":
        lengths = [41, 5, 60]
        position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
        ids = ids.reshape(1, -1)
        return dict(input_ids=ids, position_ids=position_ids, labels=ids.masked_fill(position_ids == 0, IGNORED))
    elif kind == "few tokens":  # with 4 ranks, the last one has padding only
        ids, mask = ids[:1, 8:13], mask[:1, 8:13]
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, 3:4] = IGNORED
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


KINDS = ("plain", "padded right", "padded left", "packed", "few tokens")

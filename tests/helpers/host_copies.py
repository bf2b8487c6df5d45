"""Copies to the host's memory and back without a GPU: they are made at once, and counted."""

import torch

from peft_longlora.memory import places


def leaves(tensor: torch.Tensor) -> bool:
    """In place of `places._leaves`: tensors of any size, but for an empty one, which PyTorch 2.11 saves."""
    return tensor.is_floating_point() and tensor.numel() > 0 and not isinstance(tensor, torch.nn.Parameter)


class Away:
    """As `places._Away`, without a GPU; notes what is back and not yet handed on."""

    back, leaving, handed, most = 0, 0, 0, 0

    pairs = places._Away._pairs

    def __init__(self, tensor, chunks, stream, block):
        self.chunks, self.like, self.here, self.block, self.is_leaving = chunks, tensor.new_empty(0), None, block, True
        self.shape, self.size, self.device = tensor.shape, tensor.nbytes, tensor.device
        for chunk, part in self.pairs(tensor.contiguous()):
            chunk.copy_(part)
        Away.leaving += 1

    def back_again(self):
        tensor = self.like.new_empty(self.shape)
        for chunk, part in self.pairs(tensor):
            part.copy_(chunk)
        return tensor

    def leave(self):
        Away.leaving -= self.is_leaving
        self.is_leaving = False

    def fetch(self):
        if self.here is None and not self.is_leaving:
            self.here = self.back_again()
            Away.back += 1

    def get(self):
        Away.handed += 1
        if self.is_leaving:
            self.leave()
            return self.back_again()
        self.fetch()
        tensor, self.here = self.here, None
        Away.back -= 1
        Away.most = max(Away.most, Away.back)
        return tensor

"""A fused loss that holds on a CPU what Liger's (0.8.5) holds on a GPU: both gradients, and no logits of the row.

Liger multiplies a chunk of hidden states by the output layer's matrix, writes the logits' gradient over the logits, and
adds the matrix's gradient up in the matrix's own dtype, without a copy of it.
"""

from types import MethodType, SimpleNamespace

import torch

ROWS, PARTS = 8, 4  # rows and parts of a matrix that are computed at a time, where Liger's kernels need no memory


class Fused(torch.autograd.Function):
    """(N, hidden), (V, hidden) and (N,) labels: the sum of the losses."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        count = -(-len(hidden) // -(-weight.shape[0] // weight.shape[1]))
        size = 1 << (count - 1).bit_length()
        grad_hidden, grad_weight, total = torch.zeros_like(hidden), torch.zeros_like(weight), 0.0
        for some, rows, found in zip(hidden.split(size), grad_hidden.split(size), labels.split(size), strict=True):
            logits = some @ weight.t()
            for few, mine in zip(logits.split(ROWS), found[:, None].split(ROWS), strict=True):
                logs = few.float().log_softmax(-1)
                total = total - logs.gather(1, mine).sum()
                few.copy_(logs.exp_().scatter_add_(1, mine, -torch.ones(mine.shape)))
                del logs
            rows.copy_(logits @ weight)
            for part, sums in zip(logits.chunk(PARTS, 1), grad_weight.chunk(PARTS), strict=True):
                sums += part.t() @ some
            del logits
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *ctx.saved_tensors, None


def use_fused_loss(model):
    """Give a PEFT model of transformers this loss: its output layer's matrix is read, and the layer is not called."""
    core = model.get_base_model()

    def forward(self, input_ids, labels):
        hidden = self.model(input_ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        return SimpleNamespace(loss=Fused.apply(hidden, self.lm_head.weight, labels[:, 1:].flatten()))

    core.forward = MethodType(forward, core)
    return model

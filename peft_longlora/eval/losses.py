"""Cross entropy of every token of a long window, without the logits of the whole window.

A window's logits would be the largest tensor: 32,768 tokens of a 128,256-token vocabulary are 16.8 GB in float32. Here
the model runs once, and its output embeddings get only the last token. The other hidden states then go through the
output embeddings in chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

# float32 logits of one chunk.
CHUNK_BYTES = 256 * 2**20


class TokenLosses:
    """Token losses of a causal language model of transformers, bare or PEFT.

    Args:
        model: called as model(input_ids=..., use_cache=False); in evaluation mode.
        chunk_size: tokens whose logits are in memory at once. None: as many as fit into 256 MiB.

    Raises:
        NotImplementedError: the model has no output embeddings.
    """

    def __init__(self, model: nn.Module, chunk_size: int | None = None):
        self.model = model
        self.head = model.get_output_embeddings()
        if self.head is None:
            kind = type(model.get_base_model() if isinstance(model, PeftModel) else model)
            raise NotImplementedError(
                f"{kind.__name__} names no output embeddings, so it cannot score tokens. Use a causal model."
            )
        self.chunk_size = chunk_size
        self._is_plain: bool | None = None

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses of targets, each given all inputs up to its place.

        Args:
            inputs: (S,) token ids. targets: (n,) token ids, n <= S; target i is the token after input i.

        Returns:
            (n,) float32, nats, on the model's device.
        """
        # Both copies come before the forward: a copy that waits for the GPU would keep new work from it.
        inputs, targets = (_move(x, self.model.device) for x in (inputs, targets))
        inputs = inputs[None]
        hidden, last_logits = self._hidden_states(inputs)
        size = self.chunk_size or max(16, CHUNK_BYTES // (4 * last_logits.shape[-1]))
        targets = targets.to(last_logits.device)
        losses = []
        for start in range(0, len(targets), size):
            part = targets[start : start + size]
            logits = self._logits(hidden[:, start : start + len(part)], inputs)
            # One operation from the model's precision to float32: it reads and writes half of what .float() and
            # cross_entropy do, which is 4% of a 32k forward of a model whose vocabulary is 85 times its width.
            scores = F.log_softmax(logits[0], dim=-1, dtype=torch.float32)
            losses.append(-scores.gather(1, part[:, None])[:, 0])
        return torch.cat(losses)

    @torch.no_grad()
    def likeliest(self, inputs: torch.Tensor, count: int) -> torch.Tensor:
        """The most likely tokens after each of the last `count` inputs, (count,) on the model's device.

        Args:
            inputs: (S,) token ids.
        """
        inputs = _move(inputs, self.model.device)[None]
        hidden, _ = self._hidden_states(inputs)
        return self._logits(hidden[:, -count:], inputs)[0].argmax(-1)

    def start(self, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start to compute the same losses. Returns a function that waits and gives them on the CPU; until then the GPU
        may get more work."""
        losses = self(inputs, targets)
        if losses.device.type != "cuda":
            return losses.cpu
        copy = losses.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream(losses.device).record_event()

        def wait() -> torch.Tensor:
            copied.synchronize()
            return copy

        return wait

    def _hidden_states(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The (1, S, hidden size) states for the output embeddings, and the logits of the last token."""
        seen = []

        def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            seen.append(arguments[0])
            return (arguments[0][:, -1:],)

        handle = self.head.register_forward_pre_hook(keep)
        try:
            logits = self.model(input_ids=inputs, use_cache=False).logits
        finally:
            handle.remove()
        if self._is_plain is None:
            # Some models scale or cap the result of the output embeddings.
            self._is_plain = torch.equal(self.head(seen[0][:, -1:]), logits)
        return seen[0], logits

    def _logits(self, hidden: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of a chunk, from the output embeddings, or from the model's own last step if that does more.

        For the latter the model runs on one token, and its output embeddings get the chunk instead.
        """
        if self._is_plain:
            return self.head(hidden)
        handle = self.head.register_forward_pre_hook(lambda _module, _arguments: (hidden,))
        try:
            return self.model(input_ids=inputs[:, :1], use_cache=False).logits
        finally:
            handle.remove()


def _move(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device, in order with its other work. (From pageable memory CUDA would wait for that work first.)"""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

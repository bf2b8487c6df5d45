"""What a run logs beside the loss: the loss by position in the document, tokens per second, and the peak of memory.

A long window is worth its price if tokens far from the start of their document are predicted better than near ones, and
one mean loss cannot show that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

FIRST_EDGE = 512  # tokens; the first bucket ends here, and each of the others is twice as long as the one before


def bucket_edges(length: int) -> list[int]:
    """The edges between buckets of positions. Example: 512, 1024, 2048 for rows of 4096 tokens."""
    edges, edge = [], min(FIRST_EDGE, max(1, length // 4))
    while edge < length:
        edges.append(edge)
        edge *= 2
    return edges


class Meter:
    """Sums losses of tokens by their positions, and tokens, on the device: nothing waits for it before it is read.

    Args:
        length: tokens of a row.
    """

    def __init__(self, length: int):
        self.edges = bucket_edges(length)
        self.length = length
        self._sums: torch.Tensor | None = None  # (2, buckets): losses, tokens
        self._tokens = 0
        self._start: float | None = None  # of the first forward, or of the last reading
        self._paused = 0.0
        self._positions: torch.Tensor | None = None

    def watch(self, model: nn.Module) -> RemovableHandle:
        """Read the token losses of every training forward of TRL's fused head."""
        return model.register_forward_hook(self._read, with_kwargs=True)

    def begin(self, inputs: dict[str, Any]) -> None:
        """Take the positions of a batch, before its forward."""
        self._start = self._start or time.perf_counter()
        ids = inputs["input_ids"]
        positions = inputs.get("position_ids")
        self._positions = positions if positions is not None else torch.arange(ids.shape[1], device=ids.device)[None]
        mask = inputs.get("attention_mask")
        self._tokens = self._tokens + (ids.numel() if mask is None else mask.sum())

    def pause(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function whose time does not count, such as an evaluation or a save."""
        start = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self._paused += time.perf_counter() - start

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """{"loss_0_512": ..., "tokens_per_second": ...} since the last call, of all processes; on a GPU "peak_gib" too.

        Args:
            reduce: sums a tensor over the processes.
        """
        now = time.perf_counter()
        seconds, self._start, self._paused = now - (self._start or now) - self._paused, now, 0.0
        sums = torch.zeros(2, len(self.edges) + 1, device=device) if self._sums is None else self._sums
        tokens = torch.as_tensor(self._tokens, device=device, dtype=torch.float32).reshape(1)
        flat = reduce(torch.cat([sums.flatten(), tokens])).cpu()
        self._sums, self._tokens = None, 0
        losses, counts = flat[:-1].view(2, -1).tolist()
        bounds = [0, *self.edges, self.length]
        logs = {
            f"loss_{low}_{high}": loss / count
            for low, high, loss, count in zip(bounds, bounds[1:], losses, counts, strict=False)
            if count
        }
        if device.type == "cuda":
            logs["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return {**logs, "tokens_per_second": flat[-1].item() / max(seconds, 1e-9)}

    def _read(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        log_probs = getattr(output, "log_probs", None)
        if not model.training or log_probs is None or self._positions is None:
            return
        with torch.no_grad():
            losses = -log_probs.detach().float()
            # A token predicts the next one, which may belong to the next rank's stretch.
            positions = (self._positions[:, : losses.shape[1]] + 1).expand_as(losses)
            counted = output.label_mask
            edges = torch.tensor(self.edges, device=losses.device)
            numbers = torch.bucketize(positions.contiguous(), edges, right=True).flatten()
            sums = torch.zeros(2, len(self.edges) + 1, device=losses.device)
            sums[0].scatter_add_(0, numbers, (losses * counted).flatten())
            sums[1].scatter_add_(0, numbers, counted.float().flatten())
            self._sums = sums if self._sums is None else self._sums + sums
            self._positions = None


class MeteredMixin:
    """Before a TRL trainer in the list of bases: its log holds what a `Meter` reads.

    Args:
        meter: for rows of this training.
        args: of the trainer.
        kwargs: of the trainer.

    Example:
        >>> class MeteredTrainer(MeteredMixin, SFTTrainer): ...
        >>> trainer = MeteredTrainer(model, args=args, train_dataset=rows, meter=Meter(32768))
    """

    def __init__(self, *args: Any, meter: Meter, **kwargs: Any):
        self.meter = meter
        super().__init__(*args, **kwargs)
        self.meter.watch(self.accelerator.unwrap_model(self.model))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss. It takes note of the positions."""
        if self.model.training:
            self.meter.begin(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log, with the meter's numbers beside the training loss."""
        if "loss" in logs:
            logs.update(self.meter.read(lambda sums: self.accelerator.reduce(sums, "sum"), self.args.device))
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The trainer's evaluation; its time does not count as training."""
        return self.meter.pause(super().evaluate, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.meter.pause(super()._save_checkpoint, *args, **kwargs)

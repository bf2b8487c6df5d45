"""How many tokens a run was trained on, over all its starts.

TRL counts from zero after every start, so its `num_tokens` says what was trained since the last one. Here the count is
`TrainerState.num_input_tokens_seen`, which every checkpoint holds and which comes back with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerState


class TokenCounter(Trainer):
    """After a TRL trainer in the list of bases: counts the tokens of the whole run, and logs them as `num_tokens`.

    It stands between TRL's trainer and transformers', so that its `log` sees what TRL adds to a log.

    A run that goes on from a checkpoint without a count (of a version that kept none) has no count either, because what
    was trained before is not known.

    Example:
        >>> class CountedTrainer(SFTTrainer, TokenCounter): ...
    """

    _counted_in: TrainerState | None = None  # a start has its own
    _new: int | torch.Tensor = 0  # of this process, not yet in the state
    _is_known = True

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's step on one batch, whose tokens are counted; padding is none."""
        self._follow()
        mask = inputs.get("attention_mask")
        self._new = self._new + (inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's log. `num_tokens` is that of the whole run; it is left out if that is not known."""
        self._settle()
        for name in {"num_tokens", "eval_num_tokens"} & logs.keys():
            if self._is_known:
                logs[name] = self.state.num_input_tokens_seen
            else:
                del logs[name]
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._settle()
        super()._save_checkpoint(*args, **kwargs)

    def _settle(self) -> None:
        """Put the tokens of all processes since the last call into the state. All processes call it together."""
        self._follow()
        new = torch.as_tensor(self._new, device=self.args.device, dtype=torch.int64)
        self._new = 0
        if self._is_known:
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(new, "sum")) // self.get_tp_size()

    def _follow(self) -> None:
        """Count for the state that the Trainer has now; it makes or loads another one when training begins."""
        if self._counted_in is not self.state:
            self._counted_in, self._new = self.state, 0
            self._is_known = self.state.global_step == 0 or self.state.num_input_tokens_seen > 0

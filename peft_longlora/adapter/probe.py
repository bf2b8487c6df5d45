"""A few tokens through a model, to see that a merged or exported adapter computes what the adapter did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from peft_longlora.architecture import rows_of
from peft_longlora.few_tokens import at_rest, distance, is_elsewhere

TOKENS = 16
logger = logging.get_logger(__name__)
# How far logits may be away, as a part of their size: rounding of the weights that an adapter was merged into.
TOLERANCE = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.25, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Probe:
    """What a model computes for a few tokens.

    Attributes:
        tokens: (1, S). logits: (1, S, vocabulary).
    """

    tokens: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel) -> Probe | None:
        """Ask a model; None if it is quantised, offloaded or shared out, or needs more than tokens."""
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if is_elsewhere(model) or not dtypes <= TOLERANCE.keys() or getattr(model, "is_quantized", False):
            return None
        generator = torch.Generator().manual_seed(0)
        rows = min(rows_of(model.get_input_embeddings()), model.config.get_text_config().vocab_size)
        tokens = torch.randint(0, rows, (1, TOKENS), generator=generator)
        try:
            return cls(tokens, _logits(model, tokens))
        except Exception as error:  # a model may need more than tokens
            logger.warning_once(f"A merge or export is not checked: {type(error).__name__}: {error}")
            return None

    def compare(self, model: nn.Module, what: str) -> None:
        """Refuse a model that computes something else.

        Raises: ValueError.
        """
        found = _logits(model, self.tokens)
        tolerance = max(TOLERANCE.get(parameter.dtype, 1.0) for parameter in model.parameters())
        error = distance(found, self.logits)
        if not error <= tolerance:
            raise ValueError(
                f"{what} does not compute what the adapter does: on {TOKENS} tokens its logits are {error:.0%} of "
                f"their size away, more than the {tolerance:.0%} that rounding explains. Do not use it, and report it; "
                f"check=False skips this comparison."
            )


@torch.no_grad()
def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with at_rest(model):
        return model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()

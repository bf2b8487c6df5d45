"""What the caller of a model should know of packed rows, said once: where they are not computed as documents alone.

`forward` calls it in every layer; each thing is looked for until it was said.
"""

from __future__ import annotations

import torch
from transformers.utils import logging

from peft_longlora.attention.layer import LayerCall
from peft_longlora.attention.local import documents_of
from peft_longlora.attention.mask import S2Mask
from peft_longlora.rope.parameters import follows_longest

logger = logging.get_logger(__name__)

MASK, ROPE = "positions beside a mask", "frequencies of a whole forward"


def warn_of_packed(call: LayerCall) -> None:
    """Warn once that positions beside a mask separate nothing in evaluation, and that RoPE follows the longest row."""
    settings, inputs = call.settings, call.settings.inputs
    positions = inputs.position_ids
    if not isinstance(call.mask, S2Mask) or positions is None or call.cached or not settings.is_enabled:
        return
    if inputs.caller is None or inputs.has_cache:
        return
    is_masked = isinstance(inputs.attention_mask, torch.Tensor) and inputs.attention_mask.dim() == 2
    if MASK not in settings.warned and not call.is_sparse and is_masked and _is_packed(call, positions):
        settings.warned.add(MASK)
        logger.warning(
            "position_ids that restart came beside a 2-D attention_mask in evaluation. There transformers does not "
            "keep documents apart, so they see each other (in training they do not). Leave attention_mask out, or give "
            "each document a row of its own."
        )
    if (
        ROPE not in settings.warned
        and call.is_sparse
        and follows_longest(settings.config)
        and _is_packed(call, positions)
    ):
        settings.warned.add(ROPE)
        logger.warning(
            "rope_type 'dynamic' and 'longrope' take their frequencies from the longest position of a forward, so a "
            "short document that shares a forward with a long one is not computed as it is alone. Use another "
            "rope_type ('yarn', 'llama3', 'linear', 'ntk') for packed rows, or rows of one document of similar length."
        )


def _is_packed(call: LayerCall, positions: torch.Tensor) -> bool:
    """Whether a row holds several documents; found once a forward."""
    # Another mask, because in evaluation this one knows no positions.
    return call.mask.once("packed by positions", lambda: documents_of(call.mask).is_packed(positions))

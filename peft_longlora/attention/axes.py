"""Positions of several axes, as models that see images take them: where the text's documents start in them.

Called by `inputs`.
"""

from __future__ import annotations

import torch


def has_axes_only(position_ids: torch.Tensor | None) -> bool:
    """Whether positions are those of axes of images, and none of them counts the tokens of the text."""
    return position_ids is not None and position_ids.dim() == 3 and len(position_ids) <= 3


def text_positions(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """(1 or B, S) positions that restart where a document starts, from positions of several axes.

    Args:
        position_ids: (1 or B, S), which is returned; or (axes, B, S): time, height and width of models that see images.
            If there are more than three axes, the first one counts the tokens of the text, as transformers has it
            (Qwen2-VL and its like put it there for packed rows).

    The tokens of an image share a time, and text after a video may go on at an earlier one, so a document does not
    start where a time fails to grow by one. It starts where time, height and width are 0.

    Example: time 0 1 1 1 3 0 1 (an image of three tokens, then a second document): 0 1 2 3 4 0 1.
    """
    if position_ids is None or position_ids.dim() != 3:
        return position_ids
    if not has_axes_only(position_ids):
        return position_ids[0]
    place = torch.arange(position_ids.shape[2], device=position_ids.device).expand(position_ids.shape[1:])
    return place - (place * (position_ids == 0).all(0)).cummax(1).values

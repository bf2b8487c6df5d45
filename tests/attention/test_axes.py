"""Positions of several axes, in packed rows with images."""

import torch

from peft_longlora.attention.axes import text_positions


def test_positions_of_images_tell_documents():
    """An image's tokens share a time. Two documents with an image each, and one of a token between them."""
    text = [0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 3]
    time = [0, 1, 1, 1, 1, 3, 0, 0, 0, 0, 2]
    height = [0, 1, 1, 2, 2, 3, 0, 0, 0, 1, 2]
    width = [0, 1, 2, 1, 2, 3, 0, 0, 1, 0, 2]
    axes = torch.tensor([time, height, width])[:, None]
    assert text_positions(axes).tolist() == [text]
    before = torch.tensor([text])  # transformers' form for packed rows: the text's before the axes
    assert text_positions(torch.cat([before[None], axes])).tolist() == [text]
    assert text_positions(before) is before and text_positions(None) is None

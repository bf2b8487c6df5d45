"""What models ask of a mask: the last queries of it, where layers reuse the keys of earlier ones (Gemma 4)."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from peft_longlora import configure_attention, use_attention
from peft_longlora.attention.mask import S2Mask
from peft_longlora.attention.ready import LastQueries
from tests.helpers.every_config import tiny_model

IDS = torch.arange(3, 90)[None]
PACKED = torch.cat([torch.arange(50), torch.arange(37)])[None]


def a_mask(length=8):
    return S2Mask(dict(batch_size=2, q_length=length, kv_length=length, device="cpu"))


def test_a_mask_gives_its_last_queries_and_nothing_else():
    mask, all_ = a_mask(), slice(None)
    assert mask.shape == (2, 1, 8, 8)
    assert mask[:, :, :, :] is mask and mask[:, :, slice(0, None), :] is mask
    assert mask[:, :, -3:, :] == LastQueries(mask, 3)
    for other in [(all_, all_, slice(0, 3), all_), (all_, all_, all_, slice(0, 3)), slice(1), 0, (all_, all_, 7, all_)]:
        with pytest.raises(TypeError, match="computes with the mask itself"):
            mask[other]


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="transformers has no Gemma 4")
@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("positions", [None, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("count", [1, 5, 60])
def test_logits_of_the_last_tokens_are_those_of_the_whole_row(mode, positions, count):
    """Layers that reuse keys get the last queries alone, but the groups and documents of the whole row."""
    model = tiny_model("gemma4_text").train(mode == "sparse")
    configure_attention(model, group_size=16)
    with torch.no_grad(), use_attention(model, mode):
        whole = model(IDS, position_ids=positions, use_cache=False).logits
        last = model(IDS, position_ids=positions, use_cache=False, logits_to_keep=count).logits
        torch.testing.assert_close(last, whole[:, -count:], rtol=1e-4, atol=1e-4)
        with use_attention(model, "dense" if mode == "sparse" else "sparse"):
            other = model(IDS, position_ids=positions, use_cache=False, logits_to_keep=count).logits
        assert (other - last).abs().max() > 0.01

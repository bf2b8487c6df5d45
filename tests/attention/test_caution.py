"""Warnings where documents of a packed row are not what they are alone: once, and only there."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_longlora import configure_attention
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention import caution, forward
from tests.helpers.every_config import tiny_model

IDS = torch.arange(3, 43)[None]
PACKED = dict(input_ids=IDS, position_ids=torch.cat([torch.arange(17), torch.arange(23)])[None], use_cache=False)
MASK = torch.ones_like(IDS)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(caution.logger, "warning", lines.append)
    return lines


def a_llama(**more):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16, **more))
    configure_attention(model, group_size=8)
    return model


@torch.no_grad()
def test_positions_beside_a_mask_in_evaluation(said):
    model = a_llama()
    model.train()(**PACKED, attention_mask=MASK)
    model.eval()(**PACKED)
    left = MASK.clone()
    left[:, :4] = 0
    model(
        input_ids=IDS, attention_mask=left, position_ids=(left.cumsum(1) - 1).masked_fill(left == 0, 1), use_cache=False
    )
    assert not said
    for _ in range(2):
        model(**PACKED, attention_mask=MASK)
    assert len(said) == 1 and "2-D attention_mask in evaluation" in said[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "linear"])
def test_frequencies_that_follow_the_longest_position(said, kind):
    model = a_llama(rope_parameters=dict(rope_type=kind, factor=4.0, rope_theta=1e4)).train()
    model(input_ids=IDS, position_ids=torch.arange(40)[None], use_cache=False)
    assert not said
    for _ in range(2):
        model(**PACKED)
    assert len(said) == (kind == "dynamic") and all("from the longest position of a forward" in line for line in said)


@torch.no_grad()
def test_padding_before_a_document_in_layers_that_count_tokens(monkeypatch):
    """Llama 4 scales queries by their place in the row, above its floor_scale."""
    lines = []
    monkeypatch.setattr(forward.logger, "warning_once", lines.append)
    model = tiny_model("llama4_text")
    configure_attention(model, group_size=16)
    floor = next(iter(find_attention_modules(model).values())).floor_scale
    for length, is_long in ((floor - 1, False), (floor, True), (floor + 16, True)):
        ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[:, :8] = 0
        model.train()(input_ids=ids, attention_mask=mask.flip(1))  # on the right
        if is_long:
            with pytest.raises(NotImplementedError, match=rf"more than {floor - 1} tokens .* Pad on the right"):
                model(input_ids=ids, attention_mask=mask)
        else:
            model(input_ids=ids, attention_mask=mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        lines.clear()
        padded = model.eval()(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 8:]
        alone = model(input_ids=ids[:, 8:]).logits
        assert torch.allclose(padded, alone, atol=1e-4) == (not is_long)
        assert bool(lines) == is_long


@pytest.mark.parametrize(
    "model_type, given, says",
    [
        ("llama4_text", "position_ids", "counts the tokens of a row by itself, also where a document starts"),
        ("llama4_text", "attention_mask", "Pad on the right"),
        ("lfm2", "position_ids", "which know no documents"),
    ],
)
def test_compiled_blocks_refuse_the_same_rows(model_type, given, says):
    model = tiny_model(model_type)
    model.set_attn_implementation("s2_attn") if model_type == "lfm2" else configure_attention(model, group_size=16)
    torch._dynamo.reset()
    for module in find_attention_modules(model).values():
        module.compile(backend="eager")
    ids = torch.randint(3, 60, (1, 80), generator=torch.Generator().manual_seed(0))
    rows = dict(position_ids=torch.cat([torch.arange(50), torch.arange(30)])[None], attention_mask=torch.ones_like(ids))
    rows["attention_mask"][:, :8] = 0
    with pytest.raises(NotImplementedError, match=says):
        model.train()(input_ids=ids, use_cache=False, **{given: rows[given]})

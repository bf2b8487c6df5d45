"""Models whose positions have several axes (Qwen-VL, GLM-4V): trained on text and on text with images, packed too."""

import pytest
import torch
from peft import get_peft_model
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peft_longlora import LongLoraConfig, configure_attention
from peft_longlora.architecture import find_text_model
from peft_longlora.reference import s2_attention_reference

G = 8
IMAGE, START, END = 90, 92, 93
TEXT = dict(vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, eos_token_id=2)
TEXT |= dict(bos_token_id=1)
VISION = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=64, patch_size=4)
VISION |= dict(spatial_merge_size=2, temporal_patch_size=2)
LATER = dict(num_position_embeddings=16, deepstack_visual_indexes=[])
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
TYPES = {  # sections, the text's own, the image encoder's own
    "qwen2_vl": (dict(mrope_section=[2, 3, 3]), {}, dict(embed_dim=32, hidden_size=64, mlp_ratio=1)),
    "qwen2_5_vl": (dict(mrope_section=[2, 3, 3]), {}, dict(window_size=16, fullatt_block_indexes=[0])),
    "qwen3_vl": (dict(mrope_section=[4, 2, 2], mrope_interleaved=True), {}, LATER),
    "qwen3_5": (
        dict(mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5),
        {**LINEAR, "layer_types": ["linear_attention", "full_attention"]},
        LATER,
    ),
    "glm4v": (dict(mrope_section=[2, 3, 3], partial_rotary_factor=1.0), {}, dict(image_size=16)),
}
SIDES = ((4, 6), (8, 4))  # patches of the images of two documents
LENGTHS = (27, 22)


def truth(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """The definition, for rows of one document; an image encoder computes as it always does."""
    if not hasattr(module, "layer_idx"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return s2_attention_reference(query, key, value, G, scaling=scaling), None


AttentionInterface.register("truth_of_axes", truth)
AttentionMaskInterface.register("truth_of_axes", sdpa_mask)


def make(name: str, attention: str | None = None):
    sections, text, vision = TYPES[name]
    rope = dict(rope_type="default", rope_theta=100.0, **sections)
    ids = dict(image_token_id=IMAGE, video_token_id=91, vision_start_token_id=START, vision_end_token_id=END)
    ids |= dict(image_start_token_id=START, image_end_token_id=END) if name == "glm4v" else {}
    config = AutoConfig.for_model(
        name, text_config={**TEXT, **text, "rope_parameters": rope}, vision_config={**VISION, **vision}, **ids
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    if attention:
        text_config = model.config.get_text_config()
        model.set_attn_implementation({"": attention, model.config.sub_configs and "text_config": attention})
        assert text_config._attn_implementation == attention
    else:
        configure_attention(model, group_size=G, backend="sdpa")
    return model.train()


def documents(model, name: str) -> list[dict]:
    """Two documents, each with an image, and the text that goes before and after it."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for (height, width), length in zip(SIDES, LENGTHS, strict=True):
        ids = torch.randint(3, 90, (1, length), generator=generator)
        tokens = height * width // 4
        ids[0, 4], ids[0, 5 : 5 + tokens], ids[0, 5 + tokens] = START, IMAGE, END
        grid = torch.tensor([[1, height, width]])
        kinds = (ids == IMAGE).int()
        positions = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0]
        made.append(
            dict(
                input_ids=ids,
                position_ids=torch.cat([torch.arange(length).view(1, 1, -1), positions]),
                pixel_values=torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator),
                image_grid_thw=grid,
                mm_token_type_ids=kinds,
            )
        )
    return made


def packed(parts: list[dict]) -> dict:
    """One row: tokens one after the other, and images too."""
    dims = dict(input_ids=1, position_ids=2, pixel_values=0, image_grid_thw=0, mm_token_type_ids=1)
    return {key: torch.cat([part[key] for part in parts], dim=dim) for key, dim in dims.items() if key in parts[0]}


def gradients(model, calls):
    logits = []
    for call in calls:
        logits.append(model(**call, use_cache=False).logits)
        logits[-1].sin().sum().backward()
    text = find_text_model(model)
    grads = {n: p.grad for n, p in text.named_parameters() if p.grad is not None}
    return torch.cat(logits, dim=1).detach(), grads


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-3)
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_text_with_images_alone_and_packed(name):
    """With the text's positions before the axes, as transformers has it for packed rows, and without."""
    true = make(name, "truth_of_axes")
    alone = documents(true, name)
    axes = [{**part, "position_ids": part["position_ids"][1:]} for part in alone]
    wanted = gradients(true, axes)  # stock takes what stands before the axes for a packed row
    assert_same(gradients(make(name), axes), wanted)
    assert_same(gradients(make(name), [{k: x for k, x in d.items() if k != "position_ids"} for d in alone]), wanted)
    assert_same(gradients(make(name), [packed(alone)]), wanted)
    assert_same(gradients(make(name), [packed(axes)]), wanted)
    blank = [{**part, "pixel_values": part["pixel_values"] * 0} for part in axes]
    assert (gradients(make(name), blank)[0] - wanted[0]).abs().max() > 1e-2  # the images are seen


@pytest.mark.parametrize("name", TYPES)
def test_text_alone_and_packed(name):
    """Positions of one axis, of three alike, and of the text before three."""
    ids = [part["input_ids"].clamp(max=80) for part in documents(make(name), name)]
    wanted = gradients(make(name, "truth_of_axes"), [dict(input_ids=x) for x in ids])
    one = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    for positions in (one, one.expand(3, 1, -1), one.expand(4, 1, -1)):
        assert_same(gradients(make(name), [dict(input_ids=torch.cat(ids, 1), position_ids=positions)]), wanted)


@pytest.mark.parametrize("name", TYPES)
def test_an_adapter_keeps_the_sections(name, tmp_path):
    """The rescaled model computes on images what a model made with those parameters does, and so does the merged."""
    base = make(name).eval()
    wanted = {**base.config.get_text_config().rope_parameters, "rope_type": "yarn", "factor": 2.0}
    wanted["original_max_position_embeddings"] = 64
    part = {k: x for k, x in documents(base, name)[0].items() if k != "position_ids"}
    with torch.no_grad():
        model = get_peft_model(
            base, LongLoraConfig(r=4, context_length=128, target_modules=["q_proj", "o_proj"])
        ).eval()
        found = model(**part, use_cache=False).logits
        assert model.config.get_text_config().rope_parameters == wanted
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        stock = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert stock.config.get_text_config().rope_parameters == wanted
    with torch.no_grad():
        torch.testing.assert_close(stock(**part, use_cache=False).logits, found, rtol=1e-4, atol=1e-4)

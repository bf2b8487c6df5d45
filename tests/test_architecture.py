"""Models that are more, or less, than a causal language model: their encoders keep out of it, encoders are refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PixtralVisionConfig,
)

from peft_longlora import LongLoraConfig, configure_attention, scale_rope, use_attention
from peft_longlora.architecture import find_attention_modules, find_rotary_modules, is_local_layer

SIZES = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
TEXT = dict(
    SIZES, vocab_size=100, num_hidden_layers=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    sliding_window=16,
)  # fmt: skip
VISION = dict(SIZES, num_hidden_layers=2, image_size=28, patch_size=7, vision_use_head=False)
IMAGE_TOKEN, GROUP = 99, 8
IDS = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(3))
PICTURE = IDS.clone()
PICTURE[0, 2:6] = IMAGE_TOKEN
WITH_IMAGE = dict(
    input_ids=PICTURE,
    token_type_ids=(PICTURE == IMAGE_TOKEN).long(),
    pixel_values=torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(4)),
)
TEXT_ONLY = dict(input_ids=IDS, token_type_ids=torch.zeros_like(IDS))


def multimodal():
    """What AutoModelForCausalLM makes of the published Gemma 3, in small."""
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_id=IMAGE_TOKEN,
        boi_token_index=97, eoi_token_index=98,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs, use_cache=False).logits


def test_images_are_seen_as_before():
    stock = multimodal()
    wanted, text = logits(stock, WITH_IMAGE), logits(stock, TEXT_ONLY)
    model = multimodal()
    configure_attention(model, group_size=GROUP)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, WITH_IMAGE), wanted) and torch.equal(logits(model, TEXT_ONLY), text)
    with use_attention(model.train(), "dense"):
        assert torch.equal(logits(model, WITH_IMAGE), wanted)
    with pytest.raises(NotImplementedError, match=r"lets tokens see later ones.*image"):
        logits(model, WITH_IMAGE)
    named = multimodal()
    named.set_attn_implementation("s2_attn")  # as from_pretrained(attn_implementation="s2_attn"): images' encoder too
    assert named.config.vision_config._attn_implementation == "s2_attn"
    assert torch.equal(logits(named, WITH_IMAGE), wanted)


def test_text_is_trained_as_in_the_language_model_alone(tmp_path):
    whole = multimodal()
    alone = Gemma3ForCausalLM(copy.deepcopy(whole.config.text_config)).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    dense = logits(alone, dict(input_ids=IDS))
    settings = dict(r=4, context_length=256, group_size=GROUP)
    wanted = logits(get_peft_model(alone, LongLoraConfig(**settings)).train(), dict(input_ids=IDS))
    assert (wanted - dense).abs().max() > 0.01

    before, parts = logits(whole, WITH_IMAGE), dict(whole.config.vision_config.to_dict())
    model = get_peft_model(whole, LongLoraConfig(**settings)).train()
    torch.testing.assert_close(logits(model, TEXT_ONLY), wanted)
    model(**TEXT_ONLY, labels=IDS).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 50 and not [name for name, p in trained.items() if p.grad is None]
    assert not [name for name in trained if "vision_tower" in name or "multi_modal_projector" in name]
    assert all(f"layers.{i}.self_attn.{x}_proj.lora_A" in str(list(trained)) for i in range(6) for x in "qkvo")
    torch.optim.SGD(trained.values(), lr=0.5).step()
    adapted = logits(model.eval(), WITH_IMAGE)
    assert not torch.equal(adapted, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(multimodal(), tmp_path), WITH_IMAGE), adapted)
    with model.disable_adapter():
        assert torch.equal(logits(model, WITH_IMAGE), before)
    base = model.unload()
    assert torch.equal(logits(base, WITH_IMAGE), before)
    assert base.config.vision_config.to_dict() == parts and base.config._attn_implementation == "sdpa"
    assert base.config.text_config._attn_implementation == base.config.vision_config._attn_implementation == "sdpa"


def test_the_parts_of_a_model_keep_attentions_of_their_own():
    model = multimodal()
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    peft_model = get_peft_model(model, LongLoraConfig(context_length=256))
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "s2_attn"
    peft_model.unload()
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "sdpa"


def test_positions_of_images_are_not_rescaled():
    """Pixtral's encoder has rotary embeddings of its own."""
    vision = PixtralVisionConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1)
    text = {**{k: v for k, v in TEXT.items() if k != "sliding_window"}, "model_type": "llama"}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    rotary = next(m for n, m in model.named_modules() if "vision" in n and "RotaryEmbedding" in type(m).__name__)
    frequencies = rotary.inv_freq.clone()
    assert rotary not in find_rotary_modules(model) and len(find_rotary_modules(model)) == 1
    assert all("language_model" in name for name in find_attention_modules(model))
    scale_rope(model, 256)
    assert torch.equal(rotary.inv_freq, frequencies)
    assert model.config.text_config.max_position_embeddings == 256


def encoder():
    sizes = dict(num_hidden_layers=2, vocab_size=100, max_position_embeddings=64, pad_token_id=0)
    return ModernBertForMaskedLM(ModernBertConfig(**SIZES, **sizes, global_attn_every_n_layers=1))


@pytest.mark.parametrize("switch", [configure_attention, lambda m: get_peft_model(m, LongLoraConfig(r=2))])
def test_an_encoder_is_refused(switch):
    model = encoder()
    with pytest.raises(NotImplementedError, match=r"modernbert \(ModernBert.*\) is not a causal.*Use a decoder"):
        switch(model)
    assert model.config._attn_implementation == "sdpa"


def test_an_encoder_that_is_loaded_by_name_says_that_it_stays_dense(caplog, monkeypatch):
    monkeypatch.setattr(__import__("logging").getLogger("transformers"), "propagate", True)
    model = encoder().train()
    wanted = model(input_ids=IDS).logits
    model.set_attn_implementation("s2_attn")
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    assert "ModernBertAttention is not causal" in caplog.text


@pytest.mark.parametrize("is_local", [False, True])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_only_windows_and_chunks_make_a_layer_local(number, is_local):
    """A layer that combines attention with a recurrent state, as Falcon-H1's, has no window."""
    whole, cut = ("full_attention", "hybrid", "attention"), ("sliding_attention", "hybrid_sliding", "chunked_attention")
    layer_type = (cut if is_local else whole)[number]
    layer = SimpleNamespace(layer_idx=1)
    config = SimpleNamespace(layer_types=["full_attention", layer_type], sliding_window=4096)
    assert is_local_layer(layer, config) == is_local


@pytest.mark.parametrize("switch", [configure_attention, lambda model: get_peft_model(model, LongLoraConfig())])
def test_a_module_that_is_no_transformers_model_is_refused(switch):
    with pytest.raises(NotImplementedError, match="Sequential is not a transformers model"):
        switch(nn.Sequential(nn.Linear(4, 4)))

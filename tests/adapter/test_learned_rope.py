"""`rope_type="learned"`: it starts as yarn, a gradient reaches every frequency, and a merged model is plain."""

import copy
import json

import pytest
import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from peft_longlora import LongLoraConfig, scale_rope
from peft_longlora.hub import export_lora
from tests.helpers.configs import tiny_llama_config

IDS = torch.randint(3, 90, (1, 200), generator=torch.Generator().manual_seed(0))


def base(**fields):
    torch.manual_seed(0)
    config = tiny_llama_config(max_position_embeddings=64, **fields)
    return LlamaForCausalLM._from_config(config, attn_implementation="s2_attn").eval()


def adapted(model=None, rope_type="learned", **fields):
    torch.manual_seed(1)
    config = LongLoraConfig(
        **{"r": 2, "context_length": 256, "rope_type": rope_type, "task_type": "CAUSAL_LM", **fields}
    )
    return get_peft_model(base() if model is None else model, config)


def stretch(model, adapter="default"):
    found = [
        p for name, p in model.named_parameters() if name.endswith(f"rotary_emb.modules_to_save.{adapter}.stretch")
    ]
    assert len(found) == 1
    return found[0]


@torch.no_grad()
def bend(model, adapter="default", scale=0.3):
    """Factors that are not yarn's."""
    weight = stretch(model, adapter)
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) * scale)
    return model


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids, use_cache=False).logits


def test_reentrant_checkpoints_are_refused_while_it_trains():
    """PyTorch would say in the backward that a graph is gone."""
    model = adapted().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r"rope_type='learned' cannot be trained with.*'use_reentrant': False"):
        model(input_ids=IDS, labels=IDS, use_cache=False)
    logits(model), model.train()
    stretch(model).requires_grad_(False)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()  # nothing to go through
    stretch(model).requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert stretch(model).grad.abs().min() > 0


@pytest.mark.parametrize("empty", [init_empty_weights, lambda: torch.device("meta")], ids=["accelerate", "torch"])
def test_a_model_without_weights_takes_it(empty):
    """As `longlora train` tries a recipe before it loads weights."""
    with empty():
        model = adapted(LlamaForCausalLM(tiny_llama_config(max_position_embeddings=64)))
        assert stretch(model).shape == (4,) and stretch(model).is_meta
        model.eval()(input_ids=torch.zeros(1, 200, dtype=torch.long, device="meta"))


def test_weights_that_come_after_the_adapter_are_taken(tmp_path):
    expected = logits(bend(adapted()))
    bend(adapted()).save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True)), expected)


def test_it_starts_as_yarn_and_leaves_it():
    learned, yarn = adapted(), adapted(rope_type="yarn")
    torch.testing.assert_close(logits(learned), logits(yarn), rtol=1e-4, atol=1e-5)
    before = logits(learned)
    assert (logits(bend(learned)) - before).abs().max() > 3e-4
    assert sum(p.requires_grad for p in learned.parameters()) == 1 + sum(p.requires_grad for p in yarn.parameters())


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_gradient_reaches_every_frequency(is_checkpointed):
    model = bend(adapted(init_lora_weights=False, attention_pattern="full")).train()
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()

    def loss():
        return model(input_ids=IDS[:, :30], labels=IDS[:, :30], use_cache=False).loss

    weight = stretch(model)
    (found,) = torch.autograd.grad(loss(), [weight])
    for i, step in ((0, 0.002), (1, 0.005), (2, 0.03)):  # the slope of the loss, measured
        sides = []
        for change in (step, -step):
            with torch.no_grad():
                weight[i] += change
                sides.append(loss().item())
                weight[i] -= change
        assert found[i].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=0.03, abs=1e-4)
    assert found.abs().max() > 1e-2


def test_a_step_of_an_optimizer_changes_it():
    model = adapted().train()
    weight = stretch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and weight.abs().min() > 1e-4


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = bend(adapted(init_lora_weights=False))
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(loaded), wanted)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert stretch(PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)).requires_grad
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rope_type"] == "learned"
    assert torch.equal(logits(copy.deepcopy(loaded)), wanted)
    card = (tmp_path / "README.md").read_text()
    assert "| RoPE | a factor for each frequency, trained from those of `" in card and "of type `longrope`" in card


def test_a_merged_model_is_plain_transformers(tmp_path):
    """Its own attention and rotary module, for rows within the base's window and beyond it."""
    model = bend(adapted(init_lora_weights=False))
    wanted = [logits(model, IDS[:, :n]) for n in (50, 200)]
    merged = model.merge_and_unload()
    names = {name for name, _ in [*merged.named_parameters(), *merged.named_buffers()]}
    assert not [name for name in names if "stretch" in name or "modules_to_save" in name]
    merged.save_pretrained(tmp_path / "merged")
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="sdpa")
    assert type(here.model.rotary_emb) is LlamaRotaryEmbedding
    for length, want in zip((50, 200), wanted, strict=True):
        torch.testing.assert_close(logits(here, IDS[:, :length]), want, rtol=1e-4, atol=1e-5)
    rope = AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters
    factors = rope["long_factor"]
    assert rope["rope_type"] == "longrope" and factors == rope["short_factor"] and rope["factor"] == 4
    assert rope["original_max_position_embeddings"] == 64 and rope["rope_theta"] == 10000.0
    wanted = 1 / (
        torch.tensor(factors) * 10000.0 ** (torch.arange(0, 2 * len(factors), 2).float() / (2 * len(factors)))
    )
    assert torch.equal(here.model.rotary_emb.inv_freq, wanted) and torch.equal(merged.model.rotary_emb.inv_freq, wanted)


@pytest.mark.parametrize("end", ["disable", "unload", "delete"])
def test_the_base_comes_back_bit_for_bit(end):
    plain = base()
    wanted, rope = logits(plain), copy.deepcopy(plain.config.rope_parameters)
    model = bend(adapted(plain, init_lora_weights=False))
    learned = logits(model)
    if end == "disable":
        with model.disable_adapter():
            assert torch.equal(logits(model), wanted)
        assert torch.equal(logits(model), learned)
        return
    if end == "delete":
        model.delete_adapter("default")
    else:
        model.unload()
    assert torch.equal(logits(plain), wanted) and plain.config.rope_parameters == rope


def test_each_adapter_has_its_own_factors():
    model = bend(adapted(init_lora_weights=False))
    first = logits(model)
    config = LongLoraConfig(
        r=2, context_length=256, rope_type="learned", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model.add_adapter("second", config)
    model.set_adapter("second")
    bend(model, "second", scale=0.1)
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="want different RoPE"):
        model.add_adapter("third", LongLoraConfig(r=2, context_length=256, rope_type="linear"))


def test_half_precision_keeps_the_frequencies():
    model = bend(adapted(base().to(torch.bfloat16)))
    before = stretch(model).clone()
    inner = model.get_base_model().model.rotary_emb.modules_to_save["default"]
    positions = torch.arange(200)[None]
    cos, _ = inner(torch.zeros(1, 1, dtype=torch.float32), positions)
    assert stretch(model).dtype == torch.float32 and torch.equal(before, stretch(model))
    inv_freq = 1 / (inner.factors() * inner._powers)
    wanted = (positions[..., None].float() * inv_freq).cos() * inner.attention_scaling
    torch.testing.assert_close(cos[..., : len(inv_freq)], wanted)


def test_what_cannot_be_learned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="context_length=64 is not above the base's 64 tokens"):
        adapted(context_length=64)
    with pytest.raises(ValueError, match="context_length=None is not above"):
        adapted(context_length=None)
    with pytest.raises(ValueError, match="exclude each other"):
        LongLoraConfig(rope_type="learned", rope_parameters={"rope_type": "linear", "factor": 4.0})
    with pytest.raises(ValueError, match="which an adapter holds"):
        scale_rope(base(), 256, rope_type="learned")
    with pytest.raises(ValueError, match="Merge instead"):
        export_lora(adapted(train_embeddings=False, train_norms=False), tmp_path)


def test_a_model_with_a_rope_for_each_type_of_layer_is_refused_and_unchanged():
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="s2_attn").eval()
    wanted, rope = logits(model), copy.deepcopy(model.config.rope_parameters)
    with pytest.raises(NotImplementedError, match="a RoPE for each type of layer"):
        adapted(model)
    assert torch.equal(logits(model), wanted) and model.config.rope_parameters == rope

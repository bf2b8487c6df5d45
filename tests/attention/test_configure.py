"""The switches: what they set, what they refuse, and that they leave nothing behind."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaForCausalLM,
)

from peft_longlora import LongLoraConfig, configure_attention, use_attention
from tests.helpers.attention_models import SIZES, G, assert_differ, build, inputs_of, sparse
from tests.helpers.configs import tiny_llama_config
from tests.helpers.every_config import tiny_model


def test_a_model_loaded_as_s2_attn_trains_sparse_with_a_quarter_of_its_window():
    inputs, _ = inputs_of("plain")
    loaded, configured = build("llama", "s2_attn").train(), build("llama")
    configure_attention(configured, group_size=64 // 4)
    assert torch.equal(loaded(**inputs).logits, configured.train()(**inputs).logits)
    assert_differ(loaded(**inputs).logits, build("llama")(**inputs).logits)


@pytest.mark.parametrize(("ratio", "group_size"), [(0.25, 16), (0.11, 6), (0.01, 2), (1, 64)])
def test_group_size_is_a_fraction_of_the_window_rounded_down_to_even(ratio, group_size):
    assert configure_attention(build("llama"), group_size_ratio=ratio).group_size == group_size


def test_two_models_in_one_process_do_not_touch_each_other():
    inputs, _ = inputs_of("plain")
    first = sparse("llama")
    before = first(**inputs).logits
    second = build("llama")
    configure_attention(second, group_size=2, pattern="local")
    second.train()
    with use_attention(second, "dense"):
        assert torch.equal(first(**inputs).logits, before)
    assert torch.equal(first(**inputs).logits, before)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(group_size=5), r"group_size=5 .*even"),
        (dict(group_size=0), r"group_size=0 .*even"),
        (dict(group_size=-4), r"group_size=-4 .*even"),
        (dict(group_size=4.0), r"group_size=4\.0 .*even"),
        (dict(group_size_ratio=0), r"group_size_ratio=0 .*\(0, 1\]"),
        (dict(group_size_ratio=1.5), r"group_size_ratio=1\.5 .*\(0, 1\]"),
        (dict(pattern="s3"), r"pattern='s3' .*'s2', 'local', 'full'"),
        (dict(dense_layers=[0, 2]), r"dense_layers=\[0, 2\] .*\[2\].*are 0, 1\."),
        (dict(dense_layers=[-1]), r"dense_layers=\[-1\]"),
        (dict(dense_layers=1), r"dense_layers=1 must be a list of layer indices"),
        (dict(dense_layers=[True]), r"dense_layers=\[True\] must be a list of layer indices"),
        (dict(dense_layers=torch.tensor([0])), r"dense_layers=tensor\(\[0\]\) must be a list of layer indices"),
        (dict(group_size_ratio="0.5"), r"group_size_ratio='0\.5' .*\(0, 1\]"),
        (dict(group_size_ratio=True), r"group_size_ratio=True .*\(0, 1\]"),
        (dict(dense_attention="sdpaa"), "sdpaa"),
    ],
)
def test_bad_values_are_refused_and_leave_the_model_as_it_was(kwargs, message):
    model = build("llama").train()
    inputs, _ = inputs_of("plain")
    before = model(**inputs).logits
    with pytest.raises(ValueError, match=message):
        configure_attention(model, **kwargs)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_layers_that_share_their_attention_have_no_numbers(name):
    for numbers in ([1], [-1]):
        with pytest.raises(ValueError, match=rf"but the attention layers of {name} have none\. Leave it out"):
            configure_attention(tiny_model(name), dense_layers=numbers)


NO_ROTARY = dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BloomConfig(**NO_ROTARY), r"bloom.*attention interface.*llama"),
        (GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4), r"gpt2.*rotary.*llama"),
        (Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8), r"softcap.*sdpa"),
    ],
    ids=["bloom", "gpt2", "gemma2"],
)
def test_architectures_that_cannot_are_refused(config, message):
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=message):
        configure_attention(model, group_size=4, backend="sdpa")
    assert model.config._attn_implementation == before


def test_a_model_whose_every_layer_has_a_window_is_told_so(caplog):
    configure_attention(build("mistral"), group_size=G)
    assert "Every layer of this model has its own window (sliding_window=5)" in caplog.text
    caplog.clear()
    configure_attention(build("gemma3_text"), group_size=G)
    assert not caplog.text


def test_no_hook_is_left_behind(llama):
    before = len(llama._forward_pre_hooks)
    configure_attention(llama, group_size=8)
    configure_attention(llama, group_size=16)
    configured = len(llama._forward_pre_hooks)
    assert configured == before + 1
    get_peft_model(llama, LongLoraConfig(r=2, context_length=128)).unload()
    assert len(llama._forward_pre_hooks) == configured


def test_rope_of_two_kinds_of_layers_without_a_window_is_refused():
    """As deepseek_v4 states it: it is unclear which of them is full attention."""
    model = LlamaForCausalLM(tiny_llama_config())
    plain = {"rope_type": "default", "rope_theta": 1e4}
    model.config.rope_parameters = {"main": plain, "compress": plain}
    with pytest.raises(NotImplementedError, match="a form of its own"):
        configure_attention(model, group_size=4)

"""Architectures in unusual shapes through their whole life: equal to the truth, or refused with the reason.

The cases and the truth are in architectures.py.
"""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from peft_longlora import LongLoraConfig, configure_attention
from peft_longlora.attention import configure
from tests.helpers import architectures
from tests.helpers.architectures import CASES, build, examine

# What is unusual about these, another case has too, and test_every_architecture.py examines all model types.
ALIKE = {
    *("cohere", "ernie4_5", "exaone4", "glm", "glm4", "granite", "granitemoe", "hunyuan_v1_dense", "ministral"),
    *("nemotron", "olmo2", "olmo3", "olmoe", "phi", "qwen2_moe", "qwen3_moe", "seed_oss", "starcoder2"),
}
BY_DEFAULT = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name in ALIKE else []) for case in CASES
]
# Shares of the logits' size. Sums in another order and merged weights differ by 1e-6 to 2e-4; a wrong mask by 1.
ROUNDING = 2e-3


@pytest.fixture
def warnings_seen(monkeypatch):
    """What the package warns of: transformers' loggers do not reach pytest's."""
    seen = []
    monkeypatch.setattr(configure.logger, "warning", lambda message, *a, **k: seen.append(message))
    return seen


@pytest.mark.parametrize("case", BY_DEFAULT)
def test_an_architecture_is_supported_or_refused_with_the_reason(case, warnings_seen):
    found = examine(case)
    if case.refused:
        assert case.refused in found["refused"]
        assert found["untouched"]
        return
    assert "refused" not in found, found["refused"]
    assert all(torch.tensor(found["losses"]).isfinite()) and found["losses"][-1] < found["losses"][0]
    assert found["trained"] == {"LoRA": True, "embeddings": True, "norms": case.norms}
    assert not found["without_gradient"]
    assert found["off_equal"]
    assert found["load_error"] == 0
    assert found["dense_error"] < ROUNDING
    assert found["sparse_error"] < ROUNDING
    assert found["tied"] == found["was_tied"]
    if case.warns:  # and S2-Attn really changes nothing
        assert case.warns in warnings_seen[0]
        assert found["sparse_effect"] == 0
    else:
        assert not warnings_seen
        assert found["sparse_effect"] > 100 * ROUNDING


@pytest.mark.parametrize(
    "model_type, changes, warns",
    [
        ("mistral", {}, True),  # the stock config holds sliding_window=4096 for all layers
        ("mistral", {"sliding_window": None}, False),
        ("mixtral", {"sliding_window": 4096}, True),
        ("starcoder2", {"sliding_window": 4096}, True),
        ("starcoder2", {}, False),
        ("qwen2", {"sliding_window": 4096}, False),  # not used before use_sliding_window
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0}, True),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 1}, False),
    ],
)
def test_a_window_in_every_layer_is_noticed(model_type, changes, warns, warnings_seen):
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model(model_type, **sizes, num_key_value_heads=2, **changes)
    configure_attention(AutoModelForCausalLM.from_config(config), group_size=16)
    assert len(warnings_seen) == warns
    assert not warns or "sliding_window=4096" in warnings_seen[0]


@pytest.mark.parametrize("rope_type", ["linear", "ntk", "dynamic", "yarn", "llama3"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3_text", "gpt_neox", "mixtral"])
def test_every_rope_type_of_an_odd_architecture_equals_plain_transformers(name, rope_type, tmp_path):
    case = next(case for case in CASES if case.name == name)
    settings = dict(r=4, context_length=128, group_size=16, rope_type=rope_type)
    model = get_peft_model(build(case), LongLoraConfig(**settings)).merge_and_unload().eval()
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert architectures.distance(model, plain, training=False) < 1e-5
    assert architectures.distance(model, build(case), training=False) > 0.01


def test_a_folder_reads_a_model_that_states_no_head_size(tmp_path):
    """transformers computes scaled RoPE from config.head_dim, and mixtral's configs hold None there."""
    case = next(case for case in CASES if case.name == "mixtral")
    base = build(case)
    assert base.config.head_dim is None
    model = get_peft_model(base, LongLoraConfig(r=4, context_length=128))
    assert base.config.head_dim == 16
    with model.disable_adapter():
        assert base.config.head_dim is None
    model.unload()
    assert base.config.head_dim is None


def test_a_scale_folded_into_latent_attention_is_refused():
    """deepseek_v3 multiplies mscale_all_dim into its layers when they are built; rescaling later would miss it."""
    case = next(case for case in CASES if case.name == "deepseek_v3")
    scaled = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64, mscale_all_dim=1.0)
    model = build(case)
    before = architectures.logits(model, dict(input_ids=torch.arange(60)[None]))
    with pytest.raises(NotImplementedError, match=r"mscale_all_dim.*from_pretrained"):
        get_peft_model(model, LongLoraConfig(r=4, context_length=128, rope_parameters=scaled))
    assert torch.equal(architectures.logits(model, dict(input_ids=torch.arange(60)[None])), before)


def test_an_encoder_and_a_decoder_is_refused():
    config = AutoConfig.for_model(
        "t5", vocab_size=97, d_model=32, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2, d_kv=16
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(NotImplementedError, match="t5"):
        configure_attention(model)

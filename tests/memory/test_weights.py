"""What `longlora plan` counts of a model that it never loads, against the model."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LlamaConfig,
    MixtralConfig,
    Starcoder2Config,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from peft_longlora.memory.estimate import Shape, Training, estimate, fixed_parts, flops
from peft_longlora.memory.plan import GIB, MEANS
from peft_longlora.memory.weights import count_weights
from tests.helpers.every_config import tiny_config
from tests.helpers.tiny import EXPERTS, make

OF_TEXT = ["llama", "qwen3", "gemma3_text", "mixtral", "starcoder2", "gpt_neox", "arcee", "lfm2", "jamba", "zamba2"]
OF_IMAGES = ["gemma3", "qwen3_vl_moe", "mistral3"]


def empty(config):
    kind = AutoModelForImageTextToText if config.model_type in OF_IMAGES else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


@pytest.mark.parametrize("family", [*OF_TEXT, "aria_text", "doge", "longcat_flash", "deepseek_v3", *OF_IMAGES])
def test_weights_are_the_models_own(family):
    """Feed-forward layers without a gate, experts in some blocks, shared blocks, image encoders."""
    config = tiny_config(family)
    shape, model = Shape.of(config), empty(config)
    counted = {id(p): p.numel() for p in model.parameters() if p.dim() > 1}
    weights = fixed_parts(shape, Training())["weights"]
    assert weights == 2 * sum(counted.values())
    assert shape.table == model.get_input_embeddings().weight.numel()
    assert (shape.beside > 0) is (family in OF_IMAGES)


def test_a_layer_without_a_gate_has_two_matrices():
    """Starcoder2-3B, by hand: 12288 inner, 24 query heads and 2 key heads of 128."""
    shape = Shape.of(Starcoder2Config())
    block = 2 * 3072 * 3072 + 2 * 3072 * 256 + 2 * 3072 * 12288
    assert shape.linear_weights == 30 * block
    assert flops(shape, 1000, 2) == pytest.approx(4000 * (30 * block + 49152 * 3072), rel=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "jamba", "deepseek_v3", "longcat_flash"])
def test_a_token_passes_some_experts(family):
    config = tiny_config(family)
    shape, model = Shape.of(config), empty(config)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3)
    active = shape.linear_weights - experts + experts * shape.active / shape.experts
    assert experts and flops(shape, 10**6, 2) == pytest.approx(4e6 * (active + shape.table), rel=0.01)


def test_experts_that_a_config_names_and_the_model_has_not():
    """Doge is dense unless `is_moe`: its working set is that of one layer."""
    shape = Shape.of(AutoConfig.for_model("doge"))
    plan = estimate(shape, Training(), 10**6, GIB, GIB, MEANS[0])
    assert (shape.experts, shape.active) == (1, 1) and plan.token_parts["working set of one block"] < 100_000


def test_a_config_of_which_no_model_can_be_made_is_refused():
    with pytest.raises(ValueError, match=r"model_type='llama': transformers cannot make a model .*Padding_idx must"):
        Shape.of(LlamaConfig(vocab_size=99, pad_token_id=100))


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_4_bit_base_is_what_transformers_converts(family):
    pytest.importorskip("bitsandbytes")
    config = make(family, **EXPERTS.get(family, {})).config
    quantizer = Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    model = empty(config)
    quantizer._process_model_before_weight_loading(model, None)
    needed = {n: p.numel() for n, p in model.named_parameters() if quantizer.param_needs_quantization(model, n)}
    assert 0 < count_weights(config).four_bit == sum(needed.values())


def test_fused_experts_stay_in_half_precision():
    config = MixtralConfig(num_hidden_layers=2)
    shape = Shape.of(config)
    attention = 2 * 2 * 4096 * (4096 + 1024)
    experts = 2 * 8 * 3 * 4096 * 14336
    routers = 2 * 8 * 4096
    assert count_weights(config).four_bit == attention and shape.sixteen_bit == experts + routers
    tables = 2 * 32000 * 4096 * 2
    weights = fixed_parts(shape, Training(four_bit=True))["weights"]
    assert weights == pytest.approx(attention * 0.5159 + 2 * experts + tables, rel=1e-4)


def test_experts_of_a_model_without_a_class_of_text_count_as_fused():
    config = AutoConfig.for_model("qwen3_vl_moe_text", num_hidden_layers=2)
    assert count_weights(config) is None
    shape = Shape.of(config)
    assert shape.sixteen_bit == 2 * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size

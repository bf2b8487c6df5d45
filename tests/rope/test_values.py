"""Values of RoPE parameters that a damaged or hostile file may hold are refused before anything is computed."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING

from peft_longlora import LongLoraConfig, scale_rope
from peft_longlora.rope.values import check_values
from tests.helpers.tiny import assert_same, extend, logits, make, snapshot, train

INF, NAN = float("inf"), float("nan")
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
BAD = {
    "factor": [INF, NAN, "2", None, True, 0, -2.0, 0.5, 1e308, [2.0]],
    "rope_theta": [INF, NAN, "1e4", None, True, 0, -10000.0, 1e300],
    "original_max_position_embeddings": [INF, NAN, "64", 0, -5, True, 2**60],
    "attention_factor": [INF, NAN, 0, -1.0, "1", 1e30],
    "beta_fast": [INF, NAN, 0, "32", 1e30],
    "partial_rotary_factor": [0.0, 9.0, NAN, "half"],
    "rope_type": [["yarn"], None, 3],
    "short_factor": ["1", 1.0, [1.0, NAN], [0.0], [-1.0], [INF]],
    "an_architectures_own": [NAN, INF],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, each in BAD.items() for value in each], ids=str)
def test_a_value_that_nothing_can_be_computed_with_is_refused(name, value):
    with pytest.raises(ValueError, match=f"rope_parameters=.*: {name}=.* must be"):
        check_values({**YARN, name: value})
    with pytest.raises(ValueError):
        LongLoraConfig(rope_parameters={**YARN, name: value})
    with pytest.raises(ValueError):
        LongLoraConfig(applied_rope_parameters={**YARN, name: value}, context_length=128, base_context_length=64)


def test_bands_of_llama3_must_be_in_order():
    with pytest.raises(ValueError, match=r"low_freq_factor=4.0 must be below high_freq_factor=4.0"):
        check_values({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0})


@pytest.mark.parametrize("extra", [{}, {"attention_factor": None}, {"mrope_section": [2, 3, 3]}, {"truncate": False}])
def test_what_models_use_is_taken(extra):
    check_values({**YARN, **extra})


def test_one_dict_and_many_are_not_mixed():
    with pytest.raises(ValueError, match="mixes 'y' with a dict for each layer type"):
        LongLoraConfig(rope_parameters={"full_attention": YARN, "x": "y"})


def test_a_damaged_file_leaves_the_base_as_it_was(tmp_path):
    extend(make()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["applied_rope_parameters"]["attention_factor"] = NAN
    path.write_text(json.dumps(config))
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"attention_factor=nan must be .* get it again"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_same(snapshot(model), before)


def test_entries_that_are_no_scaling_are_kept():
    """Of the base's rope_parameters, whatever an architecture holds there."""
    model = make()
    own = {"mrope_section": [1, 1, 2], "mrope_interleaved": True, "llama_4_scaling_beta": 0.1, "of_the_future": "x"}
    model.config.rope_parameters.update(own)
    for kind in ("yarn", "linear", "ntk", "dynamic", "llama3"):
        scale_rope(copy := make(rope_parameters={**model.config.rope_parameters}), 128, rope_type=kind)
        assert own.items() <= copy.config.rope_parameters.items()


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "ntk", "dynamic", "llama3"])
def test_a_length_that_queries_scale_by_is_kept(rope_type, tmp_path):
    """ministral3 computes with `original_max_position_embeddings`, which a linear scaling does not have."""
    if "ministral3" not in CONFIG_MAPPING:
        pytest.skip("transformers has no ministral3")
    own = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}

    def ministral():
        return make("ministral3", head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4, **own})

    model = train(extend(ministral(), rope_type=rope_type))
    kept = model.config.rope_parameters
    assert kept["llama_4_scaling_beta"] == 0.1
    assert kept["original_max_position_embeddings"] == (64 if rope_type in ("yarn", "llama3") else 16)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(ministral(), tmp_path)), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(ministral()))


@pytest.mark.parametrize("rope_type", ["ntk", "dynamic"])
def test_ntk_needs_more_than_one_pair_that_rotates(rope_type):
    """Its exponent d / (d - 2) has no value for d = 2; "dynamic" raises theta by the same rule."""
    model = make("gpt_neox", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25})
    with pytest.raises(ValueError, match=rf"rope_type='{rope_type}' .* only d=2 numbers of each head rotate"):
        scale_rope(model, 128, rope_type=rope_type)
    with pytest.raises(ValueError, match=r"'dynamic', .*'factor': 4.0.* cannot be used for gpt_neox"):
        scale_rope(model, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "partial_rotary_factor": 0.25})
    assert scale_rope(model, 128, rope_type="linear")["factor"] == 2.0


@pytest.mark.parametrize("number", [np.int64, np.int32, torch.tensor])
def test_a_window_may_be_a_number_of_numpy_or_torch(number):
    assert scale_rope(make(), number(128)) == scale_rope(make(), 128)
    for wrong in (np.float32(128), np.bool_(True), True, number(0), torch.tensor([128, 128])):
        with pytest.raises(ValueError, match=r"context_length=.* must be a positive number of tokens"):
            scale_rope(make(), wrong)

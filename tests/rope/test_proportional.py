"""Bases whose own RoPE is "proportional", with heads of several sizes (Gemma 4, LFM 3), against formulas."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from peft_longlora import LongLoraConfig, restore_rope, scale_rope
from tests.helpers.every_config import WINDOW, tiny_model

pytestmark = pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="transformers has no Gemma 4")
# Numbers of a head of full attention, and the share of them that rotates.
HEADS = {"gemma4_text": (32, 0.25), "lfm3": (16, 0.5)}
NAMES = [name for name in HEADS if name in CONFIG_MAPPING]
FACTOR = 4


def frequencies(name, theta, factor=1.0):
    """Those of the definition: the first angles of the whole head rotate, the others stand still."""
    size, share = HEADS[name]
    angles = torch.arange(size // 2)
    return torch.where(angles < int(share * size // 2), theta ** (-2 * angles / size) / factor, 0.0)


def in_use(model):
    return model.model.rotary_emb.full_attention_inv_freq


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rope_type", ["linear", "ntk"])
def test_scaling_keeps_the_part_that_rotates(name, rope_type):
    model = tiny_model(name)
    config, local = copy.deepcopy(model.config), model.model.rotary_emb.sliding_attention_inv_freq.clone()
    theta = config.rope_parameters["full_attention"]["rope_theta"]
    torch.testing.assert_close(in_use(model), frequencies(name, theta))
    scale_rope(model, FACTOR * WINDOW, rope_type=rope_type)
    if rope_type == "linear":
        wanted = frequencies(name, theta, FACTOR)
    else:  # the slowest frequency that rotates is slower by the factor, the fastest stays
        size, share = HEADS[name]
        slowest = int(share * size // 2) - 1
        wanted = frequencies(name, theta * FACTOR ** (size / (2 * slowest)))
        torch.testing.assert_close(wanted[slowest] * FACTOR, frequencies(name, theta)[slowest])
    torch.testing.assert_close(in_use(model), wanted)
    assert torch.equal(model.model.rotary_emb.sliding_attention_inv_freq, local)
    full = model.config.rope_parameters["full_attention"]
    assert full["rope_type"] == "proportional" and full["partial_rotary_factor"] == HEADS[name][1]
    assert model.config.max_position_embeddings == FACTOR * WINDOW
    saved = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    assert torch.equal(in_use(saved), in_use(model))
    restore_rope(model)
    assert model.config.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rope_type", ["yarn", "dynamic", "llama3"])
def test_a_scaling_that_transformers_cannot_combine_with_it_is_refused(name, rope_type):
    model = tiny_model(name)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=r"cannot be combined.*'proportional'.*rope_type='linear' or rope_type='ntk'"):
        scale_rope(model, FACTOR * WINDOW, rope_type=rope_type)
    assert model.config.to_dict() == before
    with pytest.raises(ValueError, match="scaled already"):
        scale_rope(_scaled(name), 2 * FACTOR * WINDOW, rope_type="linear")


def _scaled(name):
    model = tiny_model(name)
    scale_rope(model, FACTOR * WINDOW, rope_type="linear")
    return AutoModelForCausalLM.from_config(copy.deepcopy(model.config))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rope_type", ["linear", "ntk"])
def test_an_adapter_is_read_again_and_an_edited_config_refused(name, rope_type, tmp_path):
    config = LongLoraConfig(r=2, context_length=FACTOR * WINDOW, rope_type=rope_type, group_size=16)
    model = get_peft_model(tiny_model(name), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path)
    assert torch.equal(in_use(loaded.get_base_model()), in_use(model.get_base_model()))
    edited = config.applied_rope_parameters
    edited["rope_theta"] = edited["rope_theta"] * 1.5
    with pytest.raises(ValueError, match=r"do not fit applied_rope_parameters.*rope_theta"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_longer_window_nothing_is_asked(name):
    model = tiny_model(name)
    before = in_use(model).clone()
    get_peft_model(model, LongLoraConfig(r=2, group_size=16))
    assert torch.equal(in_use(model), before)

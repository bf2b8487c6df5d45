"""The window that RoPE parameters give: one rule, for bases that are scaled already too, and no token lost."""

import json

import pytest
from peft import PeftModel, get_peft_model
from torch import equal
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from peft_longlora import LongLoraConfig, configure_attention, restore_rope, scale_rope
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of
from peft_longlora.eval.subject import Subject
from peft_longlora.rope.parameters import window_of
from tests.helpers.configs import tiny_llama_config
from tests.helpers.paths import EMBEDDED
from tests.helpers.tiny import logits, make

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
SCALED = {**LINEAR, "factor": 8.0}


def group_size(model) -> int:
    (size,) = {settings_of(module).group_size for module in find_attention_modules(model).values()}
    return size


# -- rope_parameters beside context_length --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "context_length, parameters, window",
    [
        (512, {"rope_type": "linear", "factor": 2.0}, 128),
        (512, {"rope_type": "dynamic", "factor": 2.0}, 128),
        (512, {"rope_type": "yarn", "factor": 2.0}, 128),
        (512, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}, 256),
    ],
)
def test_a_window_that_the_parameters_do_not_give_is_refused(context_length, parameters, window):
    model = make()
    before, config = logits(model), model.config.to_dict()
    message = rf"context_length={context_length}.*only to a window of {window}\. Set factor to "
    with pytest.raises(ValueError, match=message):
        scale_rope(model, context_length, rope_parameters=parameters)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LongLoraConfig(context_length=context_length, rope_parameters=parameters))
    assert equal(logits(model), before) and model.config.to_dict() == config
    scale_rope(model, window, rope_parameters=parameters)
    assert window_of(model.config) == window


@pytest.mark.parametrize("context_length", [100, 129])  # with room to spare; a factor in few digits
def test_a_window_that_the_parameters_give_and_more_is_not_refused(context_length):
    model = get_peft_model(
        make(), LongLoraConfig(context_length=context_length, rope_parameters={"rope_type": "linear", "factor": 2.0})
    )
    config = model.peft_config["default"]
    assert window_of(model.config) == 128
    assert (config.applied_context_length, config.applied_group_size) == (
        min(context_length, 128),
        context_length // 8 * 2,
    )


@pytest.mark.parametrize("context_length", [256, None])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=["yarn", "llama3"],
)
def test_parameters_without_the_pretrained_length_count_from_the_bases(parameters, context_length, tmp_path):
    """As transformers counts where it reads them in a config."""
    stock = make(rope_parameters={**parameters, "rope_theta": 10000.0})
    model = get_peft_model(make(), LongLoraConfig(context_length=context_length, rope_parameters=parameters))
    rope = model.config.rope_parameters
    assert rope == stock.config.rope_parameters and rope["original_max_position_embeddings"] == 64
    assert equal(model.get_base_model().model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert loaded.config.rope_parameters == rope and window_of(loaded.config) == window_of(model.config)
    assert equal(logits(loaded.eval()), logits(model.eval()))


def test_an_edited_config_is_refused_when_it_is_used_again():
    for rope_type in ("ntk", "llama3", "yarn"):
        config = LongLoraConfig(context_length=256, rope_type=rope_type)
        get_peft_model(make(), config)
        config.context_length = 1024
        with pytest.raises(ValueError, match=rf"context_length=1024 and rope_type='{rope_type}' do not fit"):
            get_peft_model(make(), config)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3", "ntk"])
@pytest.mark.parametrize("window, context_length", [(3000, 24504), (1000, 8168), (10000, 45840)])
def test_no_token_is_lost_between_factor_and_window(rope_type, window, context_length, tmp_path):
    """24504 / 3000 * 3000 is 24503.999..."""

    def base():
        return LlamaForCausalLM(tiny_llama_config(max_position_embeddings=window))

    model = get_peft_model(base(), LongLoraConfig(context_length=context_length, rope_type=rope_type))
    assert window_of(model.config) == context_length
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert window_of(loaded.config) == context_length
    assert loaded.config.max_position_embeddings == model.config.max_position_embeddings


# -- a base that is scaled already ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(rope_parameters=SCALED), {}], ids=["rescaled", "as it is"])
def test_a_second_adapter_with_the_same_settings_changes_nothing(settings, tmp_path):
    model = get_peft_model(make(rope_parameters=LINEAR), LongLoraConfig(**settings), "first")
    window, group = 64 * (8 if settings else 4), 64  # a quarter of the base's own window, where no length is named
    assert group_size(model) == group
    with model.disable_adapter():
        model.add_adapter("second", LongLoraConfig(**settings))
    model.add_adapter("third", LongLoraConfig(**settings, group_size=group))
    assert group_size(model) == group
    for config in model.peft_config.values():
        assert (config.base_context_length, config.applied_context_length) == (64 * 4, window)
        assert config.applied_group_size == group
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(rope_parameters=LINEAR), tmp_path / "second")
    assert group_size(loaded) == group and window_of(loaded.config) == window


def test_an_adapter_that_states_the_length_before_scaling_still_loads(tmp_path):
    """As version 0.1.0 wrote it on a base with linear scaling."""
    model = get_peft_model(make(rope_parameters=LINEAR), LongLoraConfig(rope_parameters=SCALED))
    wanted = logits(model.eval())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    del fields["applied_context_length"], fields["applied_group_size"]
    path.write_text(json.dumps({**fields, "base_context_length": 64}))
    assert equal(logits(PeftModel.from_pretrained(make(rope_parameters=LINEAR), tmp_path)), wanted)


def test_evaluation_names_the_window_of_a_scaled_base():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, rope_parameters=LINEAR)
    subject = Subject.of(get_peft_model(model, LongLoraConfig(rope_parameters=SCALED)), tokenizer)
    assert (subject.native_window, subject.window) == (512 * 4, 512 * 8)
    with subject.as_base() as base:
        assert base.window == window_of(subject.model.config) == 512 * 4


# -- groups follow the window ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["attention first", "RoPE first"])
@pytest.mark.parametrize("how, size", [({}, 128), (dict(group_size_ratio=0.5), 256), (dict(group_size=16), 16)])
def test_groups_are_those_of_the_new_window_in_any_order(order, how, size):
    model = make()
    if order == "attention first":
        configure_attention(model, **how)
        scale_rope(model, 512)
    else:
        scale_rope(model, 512)
        configure_attention(model, **how)
    assert group_size(model) == size
    restore_rope(model)
    assert group_size(model) == (size if "group_size" in how else size * 64 // 512)


def test_groups_of_a_model_that_was_loaded_by_name_follow_too(tmp_path):
    make().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="s2_attn")
    logits(model.train())
    assert group_size(model) == 16
    scale_rope(model, 512)
    assert group_size(model) == 128


def test_settings_from_before_an_adapter_follow_what_it_merged():
    model = make()
    configure_attention(model)
    merged = get_peft_model(model, LongLoraConfig(context_length=512, group_size=32)).merge_and_unload()
    assert group_size(merged) == 128

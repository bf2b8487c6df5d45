"""Settings that do not go together are refused: idle ones, contradictions, and those that an adapter's file denies."""

import dataclasses
import json
import logging
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora import Linear, LoraModel

from peft_longlora import LongLoraConfig, configure_attention, use_attention
from peft_longlora.rope.state import OWNER
from tests.helpers.tiny import IDS, extend, logits, make, train

IDLE = {
    "two sizes": (dict(group_size=16, group_size_ratio=0.5), "group_size=16 and group_size_ratio=0.5 both"),
    "blocks of s2": (dict(chosen_blocks=2), "chosen_blocks=2 has no effect with {}='s2'.*{}='adaptive'"),
    "blocks of window": (dict(chosen_blocks=2, pattern="window"), "chosen_blocks=2 has no effect with {}='window'"),
    "size of full": (dict(group_size=16, pattern="full"), "group_size=16 has no effect with {}='full'"),
    "share of full": (dict(group_size_ratio=0.5, pattern="full"), "group_size_ratio=0.5 has no effect with {}='full'"),
    "layers of full": (dict(dense_layers=[0], pattern="full"), r"dense_layers=\[0\] has no effect with {}='full'"),
    "every of full": (dict(dense_every=3, pattern="full"), "dense_every=3 has no effect with {}='full'"),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_setting_without_effect_is_refused_by_the_config_and_by_configure_attention(case):
    given, message = IDLE[case]
    name = {"pattern": "attention_pattern"}
    with pytest.raises(ValueError, match=message.format(*["attention_pattern"] * 2)):
        LongLoraConfig(context_length=128, **{name.get(key, key): value for key, value in given.items()})
    with pytest.raises(ValueError, match=message.format(*["pattern"] * 2)):
        configure_attention(make(), **given)


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "llama3"])
def test_a_rope_type_without_a_window_is_refused(kind):
    with pytest.raises(ValueError, match=f"rope_type='{kind}' has no effect without context_length"):
        LongLoraConfig(rope_type=kind)


@pytest.mark.parametrize("field", ["train_embeddings", "train_norms", "context_length", None])
def test_an_adapter_that_waits_for_its_tokens_says_what_does_not_wait(field, caplog):
    fields = dict(train_embeddings=False, train_norms=False, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    value = {} if field is None else {field: 128 if field == "context_length" else True}
    logging.getLogger("peft_longlora").propagate = True
    with caplog.at_level(logging.WARNING, "peft_longlora"):
        get_peft_model(make(), LongLoraConfig(r=4, **{**fields, **value}))
    warned = f"[5, 6]: LoRA begins at these tokens, but {field} change every token" in caplog.text
    assert warned == (field is not None)


def test_a_file_that_an_older_version_wrote_with_an_idle_field_still_loads(tmp_path):
    model = train(extend(make(), attention_pattern="full"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "group_size": 16, "chosen_blocks": 2, "dense_every": 2})
    )
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(model))


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rope_parameters={"rope_type": "linear", "factor": 4.0}), "rope_parameters=.* do not fit applied_rope"),
        (dict(rope_parameters={**LINEAR, "rope_theta": 5e5}), "rope_parameters=.* do not fit applied_rope"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_parameters=.* do not fit applied_rope"),
        (dict(rope_parameters=None), "context_length=None and rope_parameters=None do not fit applied_rope"),
        (dict(context_length=96), "context_length=96 do not fit applied_context_length=128"),
        (
            dict(applied_context_length=64, context_length=128),
            "context_length=128 do not fit applied_context_length=64",
        ),
    ],
    ids=str,
)
def test_a_config_that_contradicts_what_was_filled_in_is_refused(change, message):
    config = LongLoraConfig(r=4, rope_parameters=LINEAR)
    get_peft_model(make(), config)
    assert dataclasses.replace(config, r=2).rope_parameters == LINEAR
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


CONTRADICTIONS = {
    "size": (dict(group_size=8), "group_size=8 gives groups of 8 tokens, .* fit applied_group_size=16"),
    "size in use": (dict(applied_group_size=8), "group_size=16 gives groups of 16 .* fit applied_group_size=8"),
    "no size": (dict(group_size=None), "group_size_ratio=0.25 of 256 tokens gives groups of 64"),
    "theta": (dict(rope_theta=5e4), r"\(rope_theta=50000.0 there, and they give 10000.0\)"),
    "temperature": (dict(attention_factor=3.0), r"\(attention_factor=3.0 there, and they give none\)"),
    "ramp": (dict(beta_fast=16), r"\(beta_fast=16 there, and they give none\)"),
    "factor": (dict(factor=9.0), r"\(factor=9.0 there, and they give 4.0\)"),
    "original": (dict(original_max_position_embeddings=32), r"there, and they give 64\)"),
}


@pytest.fixture(scope="module")
def made():
    """A config for each rope_type after it made an adapter."""
    configs = {}
    for kind in ("yarn", "ntk", "llama3", "linear", "dynamic"):
        configs[kind] = LongLoraConfig(r=4, group_size=16, context_length=256, rope_type=kind)
        get_peft_model(make(), configs[kind])
    return configs


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_group_size_or_a_rope_edited_beside_the_one_in_use_is_refused_and_not_saved(case, made, tmp_path):
    change, message = CONTRADICTIONS[case]
    if "size" not in case:
        change = dict(applied_rope_parameters={**made["yarn"].applied_rope_parameters, **change})
    with pytest.raises(ValueError, match=message + ".*Make a new LongLoraConfig, or set applied_.*=None"):
        dataclasses.replace(made["yarn"], **change)
    edited = dataclasses.replace(made["yarn"])
    vars(edited).update(change)
    with pytest.raises(ValueError, match=message):
        edited.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    assert dataclasses.replace(made["yarn"], group_size=8, applied_group_size=None).group_size == 8


@pytest.mark.parametrize("kind", ["ntk", "llama3", "linear", "dynamic"])
def test_every_rope_type_fits_what_it_filled_in_and_no_other_theta(kind, made):
    applied = made[kind].applied_rope_parameters
    assert dataclasses.replace(made[kind], r=2).applied_rope_parameters == applied
    with pytest.raises(ValueError, match="rope_theta"):
        dataclasses.replace(made[kind], applied_rope_parameters={**applied, "rope_theta": applied["rope_theta"] * 1.1})


BASES = {
    "llama": ({}, dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
    "gpt_neox": tuple(
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part})
        for part in (0.5, 1.0)
    ),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("fields", [{}, dict(context_length=None), dict(rope_type="ntk")], ids=str)
@pytest.mark.parametrize("is_old", [False, True], ids=["now", "older file"])
def test_a_base_with_another_rope_is_refused(name, fields, is_old, tmp_path):
    """Of one window and sizes, so that nothing else tells the two bases apart."""
    of_one, of_other = BASES[name]
    extend(make(name, **of_one), **fields).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    assert content["base_rope_parameters"]["rope_type"] == "default"
    if is_old:
        del content["base_rope_parameters"]
        path.write_text(json.dumps(content))
        if "context_length" in fields or (fields and name == "llama"):
            pytest.skip("such a file says nothing of the base's RoPE, or of its theta alone")
    PeftModel.from_pretrained(make(name, **of_one), tmp_path)
    with pytest.raises(
        ValueError, match=r"made for a base with (rope_theta|partial_rotary_factor)=.*but this model has"
    ):
        PeftModel.from_pretrained(make(name, **of_other), tmp_path)


@pytest.mark.parametrize(
    "fields, name",
    [
        (dict(num_attention_heads=8, num_key_value_heads=4), "num_attention_heads=4, but this model has 8"),
        (dict(num_key_value_heads=4), "num_key_value_heads=2, but this model has 4"),
    ],
    ids=["halved heads", "more KV heads"],
)
def test_a_base_with_other_heads_is_refused_even_where_shapes_are_equal(fields, name, tmp_path):
    extend(make(), target_modules=["q_proj", "o_proj"]).save_pretrained(tmp_path)
    PeftModel.from_pretrained(make(), tmp_path)
    with pytest.raises(ValueError, match=f"made for a base with {name}: its heads are others"):
        PeftModel.from_pretrained(make(**fields), tmp_path)


def test_a_base_of_another_model_type_is_warned_of(tmp_path, caplog):
    extend(make(num_key_value_heads=4)).save_pretrained(tmp_path)
    logging.getLogger("peft_longlora").propagate = True
    with caplog.at_level(logging.WARNING, "peft_longlora"):
        PeftModel.from_pretrained(make(num_key_value_heads=4), tmp_path)
        assert "model_type" not in caplog.text
        PeftModel.from_pretrained(make("mistral", num_key_value_heads=4), tmp_path)
    assert "made for a base of model_type 'llama', and this model is 'mistral'" in caplog.text


# -- configure_attention on a model with an adapter ----------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        dict(group_size=8),
        dict(group_size_ratio=0.5),
        dict(pattern="local"),
        dict(pattern="full"),
        dict(dense_layers=[0]),
        dict(dense_every=4),
        dict(pattern="adaptive", chosen_blocks=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("of", ["PeftModel", "base"])
def test_attention_that_the_adapters_config_does_not_say_is_refused(asked, of):
    model = extend(make(), group_size=16)
    sparse = model.train()(input_ids=IDS, use_cache=False).logits
    with pytest.raises(
        ValueError,
        match=rf"{next(iter(asked)).removesuffix('_ratio')}=.*adapter has .*Give it to LongLoraConfig|pattern=",
    ):
        configure_attention(model if of == "PeftModel" else model.get_base_model(), **asked)
    assert torch.equal(model.train()(input_ids=IDS, use_cache=False).logits, sparse)


def test_kernels_may_be_changed_under_an_adapter_and_nothing_else_changes():
    model = extend(make(), group_size=16, attention_pattern="local", dense_layers=[1])
    sparse = model.train()(input_ids=IDS, use_cache=False).logits
    settings = configure_attention(model, dense_attention="eager", backend="sdpa", group_size=16, pattern="local")
    assert (settings.group_size, settings.pattern, settings.dense_layers) == (16, "local", {1})
    assert (settings.dense_attention, settings.backend) == ("eager", "sdpa")
    torch.testing.assert_close(model.train()(input_ids=IDS, use_cache=False).logits, sparse)
    with model.disable_adapter():
        configure_attention(model, backend="flex")
        with pytest.raises(ValueError, match="is disabled"), use_attention(model, "sparse"):
            pass


# -- tuners that know only LoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, dict(train_embeddings=False, train_norms=False)], ids=["copies", "lora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_xlora_refuses_our_adapters(fields, tied, tmp_path):
    extend(make(tie_word_embeddings=tied), task_type="CAUSAL_LM", **fields).save_pretrained(tmp_path)
    base = make(tie_word_embeddings=tied)
    base.config.use_cache = False
    experts = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters={"0": str(tmp_path), "1": str(tmp_path)}
    )
    with pytest.raises(NotImplementedError, match=r"X-LoRA.*export_lora"):
        get_peft_model(base, experts)


def test_pefts_own_lora_model_refuses_our_config():
    with pytest.raises(NotImplementedError, match="knows only LoRA"):
        LoraModel(make(), LongLoraConfig(r=4, target_modules=["q_proj"]), "default")


def test_layers_that_a_user_registers_are_used():
    class Own(torch.nn.Linear):
        pass

    from peft.tuners.lora import Linear

    class OwnLora(Linear):
        pass

    base = make()
    layer = base.model.layers[0].self_attn
    own = Own(32, 32, bias=False)
    own.load_state_dict(layer.q_proj.state_dict())
    layer.q_proj = own
    config = LongLoraConfig(r=4, context_length=128)
    config._register_custom_module({Own: OwnLora})
    kinds = {type(m.self_attn.q_proj).__name__ for m in get_peft_model(base, config).get_base_model().model.layers}
    assert kinds == {"OwnLora", "Linear"}


# -- messages name adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [dict(dense_every=3), dict(dense_layers=[1]), dict(group_size=8)], ids=str)
def test_a_mismatch_names_the_adapter_and_the_folder_and_only_what_differs(field, tmp_path):
    extend(make(), **field).save_pretrained(tmp_path)
    model = extend(make(), "mine")
    (name,) = field
    with pytest.raises(ValueError, match=rf"'mine' and the one in {re.escape(str(tmp_path))} .*{{'{name}': ") as found:
        model.load_adapter(tmp_path, "mine")
    assert "pattern" not in str(found.value)
    with pytest.raises(ValueError, match=r"'mine' and 'theirs' want different attention"):
        model.load_adapter(tmp_path, "theirs")


def test_stock_lora_is_as_it_was():
    model = get_peft_model(make(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert type(model.base_model) is LoraModel and not hasattr(model.get_base_model(), OWNER)
    assert type(model.get_base_model().model.layers[0].self_attn.q_proj) is Linear

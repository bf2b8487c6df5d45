"""Names in a config that match nothing: one misspelt name must not train less than was asked for, in silence."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_longlora import LongLoraConfig
from tests.helpers.tiny import EXPERTS, assert_same, extend, logits, make, snapshot, train


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("peft_longlora.adapter.names.logger.warning", lines.append)
    return lines


def trained(model):
    return {name.replace(".default", "") for name, parameter in model.named_parameters() if parameter.requires_grad}


REFUSED = {
    "target_modules": (dict(target_modules=["q_porj"]), r"'q_porj' \(is it 'q_proj' or"),
    "target_parameters": (
        dict(target_modules=["q_proj"], target_parameters=["gate.wieght"]),
        r"target_parameters=.*no effect.*'gate.wieght'",
    ),
    "modules_to_save": (dict(modules_to_save=["lm_haed"]), r"'lm_haed' \(is it 'lm_head'\?\)"),
    "exclude_modules": (dict(exclude_modules=["q_porj"]), r"exclude_modules=.*no effect.*\(is it 'q_proj'"),
    "exclude regex": (dict(exclude_modules=r".*\.9\.q_proj"), r"exclude_modules=.*no effect"),
    "layers": (dict(layers_to_transform=[0, 9]), r"layers_to_transform=\[0, 9\]: .*in layers 9 .*has layers 0 to 1"),
    "one layer": (dict(layers_to_transform=9), r"layers_to_transform=9: .*in layers 9 "),
    "rank_pattern": (dict(rank_pattern={"q_porj": 2}), r"rank_pattern=\['q_porj'\] has no effect.*\(is it 'q_proj'"),
    "alpha_pattern": (dict(alpha_pattern={"up_proj": 2}), r"alpha_pattern=\['up_proj'\] has no effect"),
    "tokens": (
        dict(trainable_token_indices={"embed_tokenz": [3]}, train_embeddings=False),
        r"trainable_token_indices=.*\(is it 'embed_tokens'\?\)",
    ),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_of_which_nothing_matches_is_refused(field):
    fields, message = REFUSED[field]
    base = make()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        extend(base, **fields)
    assert_same(snapshot(base), before)


WARNED = {
    "target_modules": dict(target_modules=["q_proj", "gate_porj"]),
    "modules_to_save": dict(modules_to_save=["lm_head", "scoer"]),
    "exclude_modules": dict(exclude_modules=["k_proj", "layers.0.v_porj"]),
    "rank_pattern": dict(rank_pattern={"q_proj": 2, "v_porj": 3}),
    "alpha_pattern": dict(alpha_pattern={"q_proj": 2, "v_porj": 3}),
}


@pytest.mark.parametrize("field", WARNED)
def test_one_name_that_matches_nothing_is_one_warning_and_the_others_count(field, said):
    """People give lists for several families of models. What trains is what stock LoRA trains."""
    plain = dict(train_embeddings=False, train_norms=False)
    model = extend(make(), **WARNED[field], **plain)
    [line] = said
    lost = list(WARNED[field][field])[-1]
    assert line.startswith(f"{field}: this model has nothing of the name {lost!r}")
    assert ("is it 'gate_proj'?" in line) == (field == "target_modules")
    defaults = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    stock = get_peft_model(make(), LoraConfig(r=4, **{**defaults, **WARNED[field]}))
    assert trained(model) == trained(stock)


def test_names_that_match_say_nothing(said, tmp_path):
    fields = dict(
        target_modules=["self_attn.q_proj", "model.layers.1.mlp.up_proj", "v_proj"],
        exclude_modules=r".*layers\.0.*v_proj",
        layers_to_transform=[0, 1],
        rank_pattern={r"layers\.\d+\.self_attn.q_proj": 2, "up_proj": 3},
        alpha_pattern={"^model.layers.1.mlp.up_proj": 7},
        modules_to_save=["lm_head", "input_layernorm"],
        train_norms=False,
    )
    model = extend(make(), **fields)
    assert not said
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(model))
    extend(make(), target_modules="all-linear", rank_pattern={"down_proj": 2})
    extend(make(), target_modules=r".*\.(q|v)_proj", alpha_pattern={"v_proj": 2})
    assert not said


@pytest.mark.parametrize("model_type", EXPERTS)
def test_old_names_of_experts_are_names(model_type, said):
    names = ["w1", "w2", "w3"] if model_type == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    extend(make(model_type, **EXPERTS[model_type]), target_modules=["q_proj", *names])
    extend(
        make(model_type, **EXPERTS[model_type]),
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj"],
        rank_pattern={"experts.gate_up_proj": 1},
    )
    assert not said


@pytest.mark.parametrize("model_type", EXPERTS)
def test_a_second_adapter_finds_experts_inside_the_wrappers_of_the_first(model_type, said):
    """Each parameter of the experts has a wrapper of its own, one in the other."""
    fields = dict(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    model = extend(make(model_type, **EXPERTS[model_type]), **fields)
    config = type(model.peft_config["default"])(r=4, context_length=128, **fields)
    model.add_adapter("second", config)
    assert not said and list(model.peft_config) == ["default", "second"]


def test_a_config_of_a_second_adapter_is_checked_on_wrapped_modules(said):
    model = extend(make(), modules_to_save=["lm_head"])
    config = type(model.peft_config["default"])(
        r=4, context_length=128, target_modules=["q_proj"], rank_pattern={"q_proj": 2}
    )
    model.add_adapter("second", config)
    assert not said
    config = type(config)(r=4, context_length=128, target_modules=["q_proj", "v_porj"])
    model.add_adapter("third", config)
    assert len(said) == 1 and "is it 'v_proj'" in said[0]
    with pytest.raises(ValueError, match="has no effect"):
        model.add_adapter("fourth", type(config)(r=4, context_length=128, modules_to_save=["lm_haed"]))
    assert list(model.peft_config) == ["default", "second", "third"]


@pytest.mark.parametrize("name", ["a.b", "", "train", "keys"])
def test_a_name_of_an_adapter_that_no_module_can_have_is_refused(name, tmp_path):
    """By whatever way it comes; base and adapter go on as they were."""
    base = make()
    before = snapshot(base)
    with pytest.raises(ValueError, match=rf"adapter_name='{name}' .* Use another name"):
        extend(base, name)
    assert_same(snapshot(base), before)
    model = train(extend(base, "first"))
    model.save_pretrained(tmp_path)
    trained = logits(model)
    with pytest.raises(ValueError, match=rf"adapter_name='{name}' .* Use another name"):
        model.add_adapter(name, LongLoraConfig(r=4, context_length=128))
    with pytest.raises(ValueError, match=rf"adapter_name='{name}' .* Use another name"):
        model.load_adapter(tmp_path / "first", name)
    assert list(model.peft_config) == ["first"] and torch.equal(logits(model), trained)
    train(model)

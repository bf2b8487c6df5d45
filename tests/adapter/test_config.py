"""`LongLoraConfig`: its defaults, what it refuses and how, and its way through adapter_config.json."""

import copy
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model

from peft_longlora import LongLoraConfig
from peft_longlora.adapter import fit
from peft_longlora.kernels.patterns import PATTERNS
from tests.helpers.tiny import make

# The field table of the contract.
DEFAULTS = {
    "context_length": None,
    "rope_type": "yarn",
    "rope_parameters": None,
    "group_size": None,
    "group_size_ratio": 0.25,
    "attention_pattern": "s2",
    "dense_layers": None,
    "train_embeddings": True,
    "train_norms": True,
    "target_modules": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0],
    "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 64,
}


def test_defaults_are_those_of_the_contract():
    config = LongLoraConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.peft_type == PeftType.LONGLORA == "LONGLORA"
    assert isinstance(config, LoraConfig)


def test_the_rest_is_loras():
    """Every field of LoraConfig is there with LoraConfig's own default."""
    lora, mine = LoraConfig(), LongLoraConfig()
    for field in dataclasses.fields(LoraConfig):
        if field.name != "peft_type":
            assert getattr(mine, field.name) == getattr(lora, field.name), field.name


def test_every_new_field_has_a_help_text():
    inherited = {field.name for field in dataclasses.fields(LoraConfig)}
    new = [field for field in dataclasses.fields(LongLoraConfig) if field.name not in inherited]
    assert {field.name for field in new} >= DEFAULTS.keys() - {"target_modules"}
    assert all(field.metadata["help"].strip() for field in new)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(use_dora=True),
        dict(use_rslora=True),
        dict(init_lora_weights="pissa"),
        dict(modules_to_save=["lm_head"]),
        dict(target_parameters=["mlp.experts.gate_up_proj"]),
        dict(alpha_pattern={"q_proj": 8}, rank_pattern={"q_proj": 4}),
        dict(layer_replication=[(0, 2), (1, 3)]),
        dict(bias="all", train_norms=False),
        dict(target_modules="all-linear"),
        dict(rope_type="longrope", rope_parameters=LONGROPE),
        dict(rope_parameters={"rope_type": "linear", "factor": 4.0}),
        dict(context_length=1, group_size=2, dense_layers=[]),
        dict(group_size_ratio=1),
        dict(attention_pattern="full", dense_layers=[], dense_every=0, group_size_ratio=0.25),
        dict(attention_pattern="adaptive", group_size=16, chosen_blocks=3),
        *(dict(rope_type=kind) for kind in ("linear", "ntk", "dynamic", "yarn", "llama3")),
        *(dict(attention_pattern=pattern) for pattern in PATTERNS),
    ],
    ids=str,
)
def test_allowed_options_survive_json(kwargs, tmp_path):
    """save_pretrained and from_pretrained, through peft's base class too, give an equal config."""
    config = LongLoraConfig(r=4, lora_alpha=8, context_length=kwargs.pop("context_length", 256), **kwargs)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LONGLORA"
    assert not [name for name in stored if name.startswith("_")]
    for cls in (LongLoraConfig, PeftConfig):
        loaded = cls.from_pretrained(str(tmp_path))
        assert type(loaded) is LongLoraConfig and loaded.peft_type is PeftType.LONGLORA
        assert as_json(loaded) == as_json(config)


def as_json(config) -> dict:
    """A config as JSON has it; what saving itself sets is left out."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("inference_mode", "peft_version")}
    return json.loads(json.dumps(values, default=sorted))


def test_configs_can_be_copied_and_printed():
    config = LongLoraConfig(context_length=256, rope_parameters=LONGROPE)
    assert copy.deepcopy(config) == config
    assert copy.deepcopy(config).rope_parameters is not config.rope_parameters
    assert "context_length=256" in repr(config)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(context_length=0), r"context_length=0 .*tokens"),
        (dict(context_length=-5), r"context_length=-5 .*tokens"),
        (dict(context_length=4096.0), r"context_length=4096\.0 .*tokens"),
        (dict(context_length="32k"), r"context_length='32k' .*tokens"),
        (dict(context_length=True), r"context_length=True .*tokens"),
        (dict(group_size=0), r"group_size=0 "),
        (dict(group_size=1), r"group_size=1 .*even.*2 or more"),
        (dict(group_size=7), r"group_size=7 .*even"),
        (dict(group_size=-2), r"group_size=-2 "),
        (dict(group_size=8.0), r"group_size=8\.0 "),
        (dict(group_size_ratio=0), r"group_size_ratio=0 .*\(0, 1\].*group_size"),
        (dict(group_size_ratio=-0.1), r"group_size_ratio=-0\.1 .*\(0, 1\]"),
        (dict(group_size_ratio=1.01), r"group_size_ratio=1\.01 .*\(0, 1\]"),
        (dict(group_size_ratio=float("nan")), r"group_size_ratio=nan .*\(0, 1\]"),
        (dict(group_size_ratio="1/4"), r"group_size_ratio='1/4' .*\(0, 1\]"),
        (dict(attention_pattern="S2"), r"attention_pattern='S2' .*'s2', 'local', 'full'"),
        (dict(attention_pattern=None), r"attention_pattern=None .*'s2', 'local', 'full'"),
        (dict(dense_layers=[-1]), r"dense_layers=\[-1\] .*0 or more"),
        (dict(dense_layers=[0.5]), r"dense_layers=\[0\.5\] .*layer indices"),
        (dict(dense_layers=[True]), r"dense_layers=\[True\] .*layer indices"),
        (dict(dense_layers=3), r"dense_layers=3 .*list"),
        (dict(dense_layers="0"), r"dense_layers='0' .*list"),
        (dict(rope_type="pi"), r"rope_type='pi' is unknown.*'linear'.*'yarn'"),
        (dict(rope_type="default"), r"rope_type='default' is unknown"),
        (dict(rope_type="longrope"), r"rope_type='longrope' needs.*rope_parameters"),
        (
            dict(rope_type="linear", rope_parameters={"rope_type": "yarn", "factor": 2.0}),
            r"rope_type='linear' and rope_parameters=.*exclude each other.*Give one",
        ),
        (dict(rope_parameters={"factor": 2.0}), r"rope_parameters=.* lacks 'rope_type'.*Add it"),
        (dict(rope_parameters=["linear", 2.0]), r"rope_parameters=\['linear', 2\.0\].*dict"),
        (dict(bias="all"), r"bias='all' and train_norms=True.*bias='none'.*train_norms=False"),
        (dict(bias="lora_only"), r"bias='lora_only' and train_norms=True"),
        (
            dict(layer_replication=[(0, 2)], dense_layers=[1]),
            r"dense_layers=\[1\] and layer_replication=.*Leave one of them out",
        ),
        (dict(format_version=99), r"format_version=99.*newer.*Update"),
        (dict(format_version="two"), r"format_version='two' must be a whole number.*get it again"),
        (
            dict(base_context_length="4k"),
            r"base_context_length='4k' must be a positive number of tokens, at most 2\*\*40",
        ),
        (dict(context_length=10**30), r"context_length=1000000000000000000000000000000 must be a positive number"),
        (dict(vocab_size=-3), r"vocab_size=-3 must be a positive number"),
        (dict(applied_rope_parameters=[1]), r"applied_rope_parameters=\[1\] must be the dict .* or None"),
        (dict(lora_alpha=float("nan")), r"lora_alpha=nan must be a finite number"),
        (dict(lora_alpha=float("-inf")), r"lora_alpha=-inf must be a finite number"),
        (
            dict(
                context_length=256,
                base_context_length=64,
                applied_rope_parameters={"rope_type": "yarn", "factor": 4.0},
                applied_context_length=99,
            ),
            r"context_length=256 .* do not fit applied_context_length=99,.*Make a new",
        ),
        (dict(train_norms="no"), r"train_norms='no' must be True or False"),
        (dict(use_rslora="false"), r"use_rslora='false' must be True or False"),
        (dict(inference_mode=1), r"inference_mode=1 must be True or False"),
        (dict(ensure_weight_tying=[]), r"ensure_weight_tying=\[\] must be True or False"),
        (dict(alora_invocation_tokens=True), r"alora_invocation_tokens=True must be a list of tokens"),
        (dict(alora_invocation_tokens=[]), r"alora_invocation_tokens=\[\] must be a list of tokens"),
        (dict(alora_invocation_tokens=["a"]), r"alora_invocation_tokens=\['a'\] must be a list of tokens"),
        (dict(r=10**30), r"r=1000000000000000000000000000000 must be a whole number, 1 or more and at most 1048576"),
        (dict(rank_pattern={"q_proj": 10**9}), r"rank_pattern={'q_proj': 1000000000} must map"),
        (dict(base_model_name_or_path=["a"]), r"base_model_name_or_path=\['a'\] must be text, or None"),
        (dict(revision=3), r"revision=3 must be text, or None"),
        (dict(auto_mapping="os"), r"auto_mapping='os' must be a dict, or None"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refusals_name_field_value_rule_and_cure(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LongLoraConfig(**kwargs)


def test_no_pattern_may_be_written_as_none():
    config = LongLoraConfig(rank_pattern=None, alpha_pattern=None)
    assert config.rank_pattern == config.alpha_pattern == {}


def test_every_switch_of_peft_has_a_rule():
    """The text "false" is true in Python."""
    switches = {name for name, value in LongLoraConfig().to_dict().items() if isinstance(value, bool)}
    for name in switches - {"init_lora_weights"}:
        with pytest.raises(ValueError, match=f"{name}='false' must be True or False"):
            LongLoraConfig(**{name: "false"})


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udc80"])
def test_a_damaged_config_file_is_named(content, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"adapter_config.json (is damaged|holds a list).* Get it again"):
        LongLoraConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["none", "me/../none", "../../none"])
def test_a_place_without_an_adapter_is_named(name, tmp_path):
    with pytest.raises(
        ValueError,
        match=f"'{re.escape(name)}': no such folder, and (no id on the Hub|not in the cache of the Hub)",
    ):
        LongLoraConfig.from_pretrained(name)


@pytest.mark.parametrize("cut", [0, 7, 40, -1])
def test_a_damaged_weights_file_is_named(cut, tmp_path):
    """The config is what PEFT reads first, so a truncated file is found before the model is touched."""
    from safetensors.torch import save_file

    LongLoraConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"weight": torch.ones(4, 4)}, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors \(\d+ bytes\) is damaged.*again"):
        LongLoraConfig.from_pretrained(str(tmp_path))


def test_training_some_rows_of_the_embeddings_and_all_of_them_is_refused():
    with pytest.raises(ValueError, match=r"trainable_token_indices.*train_embeddings=False"):
        LongLoraConfig(trainable_token_indices=[1, 2])
    assert LongLoraConfig(trainable_token_indices=[1, 2], train_embeddings=False)


@pytest.mark.parametrize("change", [dict(context_length=512), dict(rope_type="linear")], ids=str)
def test_an_edited_copy_of_a_used_config_does_not_bring_the_old_rope_along(llama, change):
    config = LongLoraConfig(r=2, context_length=256)
    get_peft_model(llama, config)
    assert dataclasses.replace(config, r=4).applied_rope_parameters == config.applied_rope_parameters
    with pytest.raises(ValueError, match=r"applied_rope_parameters.*filled in.*Make a new LongLoraConfig"):
        dataclasses.replace(config, **change)


NUMBERS = {"int64": np.int64, "int32": np.int32, "tensor": torch.tensor, "array": np.array}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_numpy_and_torch_become_pythons(number, tmp_path):
    config = LongLoraConfig(
        context_length=number(256), group_size=number(8), dense_layers=[number(0)], lora_dropout=np.float32(0.5)
    )
    assert (config.context_length, config.group_size, config.dense_layers) == (256, 8, [0])
    assert type(config.group_size) is type(config.dense_layers[0]) is int and type(config.lora_dropout) is float
    assert type(LongLoraConfig(group_size_ratio=np.float32(0.5)).group_size_ratio) is float
    config.save_pretrained(tmp_path)
    assert LongLoraConfig.from_pretrained(str(tmp_path)).group_size == 8
    for wrong in (np.float32(8.5), np.bool_(True), torch.tensor(8.0), np.array([8])):
        with pytest.raises(ValueError, match="group_size="):
            LongLoraConfig(group_size=wrong)


@pytest.mark.parametrize(("window", "is_said"), [(7, True), (64, True), (65, False), (None, False)])
def test_a_window_that_extends_nothing_is_said_once(monkeypatch, window, is_said):
    lines = []
    monkeypatch.setattr("peft_longlora.adapter.fit.logger.warning", lines.append)
    fit.logger.warning_once.__func__.cache_clear()
    for _ in range(2):
        model = get_peft_model(make(), LongLoraConfig(r=2, context_length=window, group_size=4))
    said = f"context_length={window} is not above the base's own window of 64 tokens: RoPE stays as it is, and nothing"
    assert [line.startswith(said) for line in lines] == [True] * is_said
    assert (model.config.max_position_embeddings > 64) == (window == 65)

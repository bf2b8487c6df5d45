"""Adapters of the original project: what changes numbers is carried over or refused, and damage is said at conversion.

The truth is stock PEFT: it loads the same source on a base that has the trained copies and the linear RoPE.
"""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from peft_longlora import convert_original_adapter
from tests.helpers.configs import tiny_llama_config

TOKENS = torch.arange(3, 83)[None]
TINY = {"base_context_length": 512, "vocab_size": 97, "context_length": 2048}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
FIELDS = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": TARGETS, "bias": "none"}
LAYER = "base_model.model.model.layers.0"


class Source:
    """A source of the original project, made by stock PEFT alone."""

    def __init__(self, folder, tied=False, **fields):
        self.folder, self.base = folder / "source", folder / "base"
        LlamaForCausalLM(tiny_llama_config(max_position_embeddings=512, tie_word_embeddings=tied)).save_pretrained(
            self.base
        )
        torch.manual_seed(5)
        made = {name: value for name, value in fields.items() if name not in ("modules_to_save", "peft_version")}
        model = get_peft_model(self.load(), LoraConfig(**{**FIELDS, **made, "init_lora_weights": False}))
        self.lora = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora_" in k}
        if made.get("use_dora"):
            self.lora = {
                k.removesuffix(".weight") if "magnitude" in k else k: v * 1.1 if "magnitude" in k else v
                for k, v in self.lora.items()
            }
        self.whole = {
            f"base_model.model.{k}": v + 0.05 * torch.randn_like(v)
            for k, v in self.load().named_parameters()
            if "embed" in k or "norm" in k
        }
        self.fields = {**FIELDS, **fields}

    def load(self, **options):
        return LlamaForCausalLM.from_pretrained(self.base, **options)

    def convert(self, **options):
        self.folder.mkdir(exist_ok=True)
        torch.save(self.lora, self.folder / "adapter_model.bin")
        torch.save(self.whole, self.folder / "trainable_params.bin")
        (self.folder / "adapter_config.json").write_text(json.dumps(self.fields))
        ours = self.folder.parent / "ours"
        return convert_original_adapter(self.folder, ours, base_model=str(self.base), **{**TINY, **options})

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, S, vocabulary): of the conversion, and of stock PEFT."""
        rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
        base = self.load(rope_parameters=rope)
        trained = {key.removeprefix("base_model.model."): value for key, value in self.whole.items()}
        assert not base.load_state_dict(trained, strict=False).unexpected_keys
        fields = {**self.fields, "modules_to_save": None}
        (self.folder / "adapter_config.json").write_text(json.dumps(fields))
        models = PeftModel.from_pretrained(self.load(), self.folder.parent / "ours"), base
        with torch.no_grad():
            stock = PeftModel.from_pretrained(base, self.folder).eval()(TOKENS).logits
            return models[0].eval()(TOKENS).logits, stock


CARRIED = {
    "nothing more": {},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 64, "layers.1.self_attn.v_proj": 3}},
    "rank_pattern": {"rank_pattern": {"q_proj": 4, "layers.1.self_attn.v_proj": 1}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "exclude_modules": {"exclude_modules": ["k_proj"], "target_modules": ["q_proj", "v_proj"]},
    "a pattern of targets": {"target_modules": r".*\.(q|v)_proj"},
    "no numbers": {"inference_mode": True, "revision": "main", "peft_version": "0.4.0", "merge_weights": False},
}


@pytest.mark.parametrize("case", CARRIED)
def test_a_field_that_changes_numbers_is_carried_over(tmp_path, case):
    fields = {name: value for name, value in CARRIED[case].items() if name != "merge_weights"}
    source = Source(tmp_path, **fields)
    source.fields |= CARRIED[case]
    source.convert()
    ours, stock = source.logits()
    torch.testing.assert_close(ours, stock)
    if case in ("use_rslora", "alpha_pattern"):  # the field is felt
        source.fields = FIELDS
        assert not torch.allclose(source.logits()[1], stock)


def test_an_output_layer_that_was_saved_is_carried_over_in_either_file(tmp_path):
    source = Source(tmp_path, modules_to_save=["lm_head"])
    name = "base_model.model.lm_head.weight"
    head = torch.randn(98, source.load().lm_head.in_features)  # with the row of [PAD]
    source.whole[name] = head
    source.convert()
    source.whole[name] = head[:97]
    torch.testing.assert_close(*source.logits())
    source.lora[name] = source.whole.pop(name)
    config = source.convert()
    assert config.modules_to_save == ["lm_head"]
    source.whole[name] = source.lora.pop(name)
    torch.testing.assert_close(*source.logits())
    source.lora[name], source.whole[name] = source.whole[name].half(), source.whole[name].half().float()
    source.convert()
    source.lora[name] = 2 * source.lora[name]
    with pytest.raises(ValueError, match=r"adapter_model.bin and .*trainable_params.bin both hold .*lm_head.weight"):
        source.convert()


def test_a_tied_base_needs_no_output_layer(tmp_path):
    source = Source(tmp_path, tied=True, modules_to_save=["lm_head"])
    assert source.convert().modules_to_save is None
    torch.testing.assert_close(*source.logits())
    name = "base_model.model.lm_head.weight"
    source.whole[name] = source.whole["base_model.model.model.embed_tokens.weight"].clone()
    source.convert()
    torch.testing.assert_close(*source.logits())
    source.whole[name] = -source.whole[name]
    with pytest.raises(ValueError, match=r"with different values, but the base ties the two"):
        source.convert()


def test_a_source_without_embeddings_is_converted_if_said_so(tmp_path):
    source = Source(tmp_path)
    source.whole = {key: value for key, value in source.whole.items() if "norm" in key}
    with pytest.raises(ValueError, match=r"trainable_params.bin has no embed_tokens.weight.*trainable_params='norm'"):
        source.convert()
    config = source.convert(trainable_params="norm")
    assert (config.train_embeddings, config.train_norms) == (False, True)
    torch.testing.assert_close(*source.logits())
    with pytest.raises(ValueError, match=r"trainable_params='lm_head' must be"):
        source.convert(trainable_params="lm_head")


REFUSED = {
    "no alpha": ({"lora_alpha": None}, r"config.json has lora_alpha=None, .*Write the value"),
    "no r": ({"r": None}, r"config.json has r=None, .*Write the value"),
    "no targets": ({"target_modules": None}, r"config.json has target_modules=None"),
    "alpha 0": ({"lora_alpha": 0}, r"lora_alpha=0 multiplies LoRA's product by 0"),
    "alpha 0 of some": ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern={'q_proj': 0} multiplies"),
    "a text for a switch": ({"use_rslora": "no"}, r"adapter_config.json, or .*use_rslora='no' must be True or False"),
    "biases": ({"bias": "all"}, r"bias='all'; the original's adapters have"),
    "lora_bias": ({"lora_bias": True}, r"lora_bias=True may change .*merge it"),
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' changed the base's own weights"),
    "a field of tomorrow": ({"use_future": 3}, r"use_future=3 may change .*this peft has no such field. Load"),
    "dora without magnitudes": ({"use_dora": True}, r"adapter_model.bin has no .*q_proj.lora_magnitude_vector"),
    "an output layer": ({"modules_to_save": ["lm_head"]}, r"\['lm_head'\] names 'lm_head', but neither .*has a tensor"),
    "another rank": ({"r": 4}, r"lora_A of shape \(2, 32\) .*the config says rank 4 \(r or rank_pattern\)"),
    "fewer targets": ({"target_modules": ["q_proj"]}, r"adapter_model.bin holds LoRA of .*k_proj, which the config"),
    "more targets": ({"target_modules": [*TARGETS, "up_proj"]}, r"no LoRA of \['up_proj'\], which target_modules"),
    "a broken pattern": ({"target_modules": "(q_proj"}, r"no regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be_carried_over_is_refused(tmp_path, case):
    fields, message = REFUSED[case]
    source = Source(tmp_path)
    source.fields |= fields
    with pytest.raises(ValueError, match=message):
        source.convert()
    assert not (tmp_path / "ours").exists()
    source.fields = {name: value for name, value in source.fields.items() if value is not None}
    if None in fields.values():
        with pytest.raises(ValueError, match=message):
            source.convert()


DAMAGED = {
    "no A": ("lora", lambda t: _drop(t, f"{LAYER}.self_attn.k_proj.lora_A"), r"no .*layers.0.*k_proj.lora_A.weight"),
    "no B": ("lora", lambda t: _drop(t, f"{LAYER}.self_attn.k_proj.lora_B"), r"no .*layers.0.*k_proj.lora_B.weight"),
    "no pair": ("lora", lambda t: _drop(t, f"{LAYER}.self_attn.k_proj"), r"has .*k_proj, but no .*layers.0.*k_proj"),
    "no layer": ("lora", lambda t: _drop(t, LAYER), r"has .*k_proj, but no .*layers.0.*k_proj"),
    "nothing": ("lora", lambda t: t.clear(), r"adapter_model.bin has no LoRA of"),
    "not a matrix": ("lora", lambda t: _change(t, "lora_A", torch.ones(2)), r"lora_A of shape \(2,\)"),
    "magnitudes": (
        "lora",
        lambda t: t.update({f"{LAYER}.self_attn.k_proj.lora_magnitude_vector": torch.ones(32)}),
        r"lora_magnitude_vector, which an adapter with use_dora=False does not have",
    ),
    "NaN": ("lora", lambda t: _change(t, "lora_B", torch.tensor(float("nan"))), r"adapter_model.bin: .*not finite"),
    "whole numbers": ("whole", lambda t: _change(t, "norm", torch.ones(32).int()), r"params.bin: .*holds torch.int32"),
    "no norm": ("whole", lambda t: _drop(t, f"{LAYER}.input_layernorm"), r"has .*but no .*layers.0.input_layernorm"),
    "no last norm": ("whole", lambda t: _drop(t, "base_model.model.model.norm"), r"trainable_params.bin has no last n"),
    "an MLP": (
        "whole",
        lambda t: t.update({f"{LAYER}.mlp.up_proj.weight": torch.ones(4, 4)}),
        r"trainable_params.bin holds 1 tensors that the conversion would drop, .*mlp.up_proj.weight.*modules_to_save",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_source_is_refused_under_its_own_name(tmp_path, case):
    which, damage, message = DAMAGED[case]
    source = Source(tmp_path)
    damage(getattr(source, which))
    with pytest.raises(ValueError, match=message) as caught:
        source.convert()
    name = {"lora": "adapter_model.bin", "whole": "trainable_params.bin"}[which]
    assert str(source.folder / name) in str(caught.value)
    assert not (tmp_path / "ours").exists()


def _drop(tensors, start):
    for key in [key for key in tensors if key.startswith(start)]:
        del tensors[key]


def _change(tensors, part, value):
    tensors[next(key for key in tensors if part in key)] = value

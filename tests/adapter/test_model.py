"""The life of an adapter: made, trained, switched off, removed, merged, joined by another; and what it refuses.

What a fresh process reads of it is in test_another_process.py.
"""

import copy
import json

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_longlora import LongLoraConfig, configure_attention, restore_rope, scale_rope
from tests.helpers.releases import own_adapters
from tests.helpers.tiny import EXPERTS, assert_same, extend, logits, make, snapshot, train

ROPE_TYPES = ["linear", "ntk", "dynamic", "yarn", "llama3"]
BASES = {
    "llama": {},
    "llama tied": dict(tie_word_embeddings=True),
    "gpt_neox tied": dict(model_type="gpt_neox", tie_word_embeddings=True),
    "gemma3_text": dict(model_type="gemma3_text", head_dim=8, sliding_window=16, num_hidden_layers=6),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}


# -- going back to the base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("base", BASES)
def test_switching_off_and_removing_give_the_base_back(base, dtype):
    model = make(dtype=dtype, **BASES[base])
    before = snapshot(model)
    peft_model = train(extend(model))
    adapted = logits(peft_model)
    assert not torch.equal(adapted, before["logits"])

    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), before["logits"])
        assert json.loads(model.config.to_json_string(use_diff=False)) == before["config"]
        peft_model.train()  # the reference of a preference trainer runs in training mode, too
        assert torch.equal(logits(peft_model), before["logits"])
        peft_model.eval()
    assert torch.equal(logits(peft_model), adapted)

    # PEFT leaves a base frozen, adapter or not: all else is back.
    assert_same(snapshot(peft_model.unload()), before, but=("requires_grad",))

    peft_model = train(extend(model))
    peft_model.delete_adapter("default")
    assert torch.equal(logits(model), before["logits"])
    assert torch.equal(logits(model.train()), before["logits"])
    assert json.loads(model.config.to_json_string(use_diff=False)) == before["config"]
    assert model.config._attn_implementation == before["attention"]


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_every_rope_type_is_undone(rope_type):
    model = make()
    before = snapshot(model)
    peft_model = extend(model, rope_type=rope_type)
    assert not torch.equal(logits(peft_model), before["logits"])
    logits(peft_model, torch.randint(3, 97, (1, 200)))  # "dynamic" grows its frequencies with the row
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), before["logits"])
    assert_same(snapshot(peft_model.unload()), before, but=("requires_grad",))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_the_user_chose_comes_back(attention):
    model = make()
    model.set_attn_implementation(attention)
    of_base = logits(model)
    peft_model = extend(model)
    assert model.config._attn_implementation == "s2_attn"
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), of_base)
    assert peft_model.unload().config._attn_implementation == attention
    assert extend(model).merge_and_unload().config._attn_implementation == attention


def test_settings_of_an_earlier_configure_attention_come_back():
    model = make()
    configure_attention(model, group_size=32, pattern="local")
    sparse = logits(model.train())
    extend(model.eval(), group_size=16).unload()
    assert model.config._attn_implementation == "s2_attn"
    assert torch.equal(logits(model.train()), sparse)


def test_a_rope_scaled_by_the_user_comes_back():
    """`scale_rope` before the adapter: the adapter finds it and must not take it away."""
    model = make()
    of_base = logits(model)
    scale_rope(model, 128, rope_type="linear")
    scaled = logits(model)
    with pytest.raises(ValueError, match="restore_rope"):
        extend(model)
    assert torch.equal(logits(model), scaled)
    restore_rope(model)
    assert torch.equal(logits(model), of_base)


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_a_merged_model_is_a_plain_one(base, tmp_path):
    model = make(**BASES[base])
    before = snapshot(model)
    peft_model = train(extend(model))
    adapted = logits(peft_model)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-4)
    after = snapshot(merged)
    for key in ("types", "shapes", "settings", "attention", "tied"):
        assert after[key] == before[key], key
    assert torch.equal(logits(merged.train()), logits(merged.eval()))  # nothing sparse is left
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), after["logits"])
    again = train(extend(merged, context_length=None))  # and it can be adapted anew
    assert torch.equal(logits(again.unload()), after["logits"])


def test_weights_are_tied_again_on_request():
    """As lm-eval and accelerate ask for it; the trained copies and the base's own stay two things."""
    model = train(extend(make(tie_word_embeddings=True)))
    before = logits(model)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.modules_to_save["default"].weight = torch.nn.Parameter(head.modules_to_save["default"].weight + 1)
    assert not torch.equal(logits(model), before)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    embeddings = model.get_input_embeddings()
    assert head.original_module.weight is embeddings.original_module.weight
    assert head.modules_to_save["default"].weight is embeddings.modules_to_save["default"].weight
    plain = extend(make(tie_word_embeddings=True), train_embeddings=False)
    before = logits(plain)
    plain.tie_weights()
    assert torch.equal(logits(plain), before)


def test_a_tie_is_kept_while_training_and_in_the_file(tmp_path):
    for model_type, name in (("llama", "embed_tokens"), ("gpt_neox", "embed_in")):
        folder = tmp_path / model_type
        peft_model = train(extend(make(model_type, tie_word_embeddings=True)))
        base = peft_model.get_base_model()
        trained = base.get_input_embeddings().modules_to_save["default"].weight
        assert base.get_output_embeddings().modules_to_save["default"].weight is trained
        assert not torch.equal(trained, base.get_input_embeddings().original_module.weight)
        peft_model.save_pretrained(folder)
        saved = load_file(folder / "adapter_model.safetensors")
        copies = {key: tensor for key, tensor in saved.items() if tensor.shape == (97, 32)}
        assert any(name in key for key in copies)
        assert all(torch.equal(tensor, trained) for tensor in copies.values())
        merged = peft_model.merge_and_unload()
        assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
        assert torch.equal(merged.get_input_embeddings().weight, trained)


# -- more than one adapter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_two_adapters_share_rope_and_attention_and_switch(tied):
    model = make(tie_word_embeddings=tied)
    of_base = logits(model)
    peft_model = train(extend(model, "first"))
    first = logits(peft_model)
    peft_model.add_adapter("second", LongLoraConfig(r=8, context_length=128))
    peft_model.set_adapter("second")
    second = logits(train(peft_model, steps=1))
    assert not torch.equal(first, second)
    peft_model.set_adapter("first")
    assert torch.equal(logits(peft_model), first)
    assert not any(p.requires_grad for n, p in peft_model.named_parameters() if ".second." in n)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), of_base)
    peft_model.delete_adapter("first")
    peft_model.set_adapter("second")
    assert torch.equal(logits(peft_model), second)
    peft_model.delete_adapter("second")
    assert torch.equal(logits(model), of_base)


@pytest.mark.parametrize("config", ["new", "the first one's"])
def test_a_second_adapter_on_a_tied_base_is_tied_in_memory_in_its_file_and_merged(config, tmp_path):
    """With a config of its own, or with the one that the first has, as DPO's reference."""
    model = train(extend(make(tie_word_embeddings=True)))
    second = LongLoraConfig(r=4, context_length=128) if config == "new" else model.peft_config["default"]
    model.add_adapter("second", second)
    model.set_adapter("second")
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = logits(train(model))
    for name in ("default", "second"):
        assert head.modules_to_save[name].weight is embeddings.modules_to_save[name].weight
    assert embeddings.modules_to_save["second"].weight is not embeddings.modules_to_save["default"].weight
    model.save_pretrained(tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(make(tie_word_embeddings=True), tmp_path / "adapters" / "second")
    assert torch.equal(logits(loaded), wanted)
    merged = model.merge_and_unload(adapter_names=["second"])
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.tie_word_embeddings and torch.equal(logits(again), logits(merged))
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_two_saved_adapters_load_onto_one_base(tied, tmp_path):
    wanted = {}
    for name, lr in (("a", 0.02), ("b", 0.01)):
        peft_model = train(extend(make(tie_word_embeddings=tied)), lr=lr)
        wanted[name] = logits(peft_model)
        peft_model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(make(tie_word_embeddings=tied), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        assert torch.equal(logits(model), wanted[name])
    model.save_pretrained(tmp_path / "both")
    for name in ("a", "b"):
        loaded = PeftModel.from_pretrained(make(tie_word_embeddings=tied), tmp_path / "both" / name)
        assert torch.equal(logits(loaded), wanted[name])


@pytest.mark.parametrize(
    "other, what",
    [
        (dict(context_length=256), "RoPE"),
        (dict(rope_type="linear"), "RoPE"),
        (dict(context_length=None), "RoPE"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "RoPE"),
        (dict(group_size=16), "attention"),
        (dict(attention_pattern="full"), "attention"),
        (dict(dense_layers=[0]), "attention"),
    ],
)
def test_a_second_adapter_that_wants_another_model_is_refused(other, what):
    peft_model = train(extend(make(), "first"))
    adapted, before = logits(peft_model), snapshot(peft_model.get_base_model())
    with pytest.raises(ValueError, match=f"'first' and 'second' want different {what}"):
        peft_model.add_adapter("second", LongLoraConfig(**{"r": 4, "context_length": 128, **other}))
    assert list(peft_model.peft_config) == ["first"]
    assert torch.equal(logits(peft_model), adapted)
    assert_same(snapshot(peft_model.get_base_model()), before)


OTHER = LongLoraConfig(r=4, context_length=256, rope_type="ntk")
# how a second model with an adapter is made of one base
SECOND = {
    "get_peft_model": lambda base, first, folder: get_peft_model(base, OTHER),
    "the same settings": lambda base, first, folder: extend(base),
    "another name": lambda base, first, folder: extend(base, "other"),
    "from_pretrained, another name": lambda base, first, folder: PeftModel.from_pretrained(base, folder, "other"),
    "from_pretrained": lambda base, first, folder: PeftModel.from_pretrained(base, folder),
    "a PeftModel": lambda base, first, folder: get_peft_model(first, OTHER),
    "a PeftModel, other name": lambda base, first, folder: get_peft_model(first, OTHER, "other"),
}


@pytest.mark.parametrize("how", SECOND)
def test_two_models_with_an_adapter_on_one_base_are_refused(how, tmp_path):
    """The second would find the first one's RoPE and groups, and save others."""
    get_peft_model(make(), copy.deepcopy(OTHER)).save_pretrained(tmp_path)
    base = make()
    model = train(extend(base))
    adapted, before = logits(model), snapshot(base)
    with pytest.raises(ValueError, match=r"adapter.*already.*unload\(\).*add_adapter or .*load_adapter"):
        SECOND[how](base, model, tmp_path)
    assert torch.equal(logits(model), adapted)
    assert_same(snapshot(base), before)
    assert model.peft_config["default"].context_length == 128
    wanted = get_peft_model(make(), copy.deepcopy(OTHER)).base_model.model.config.rope_parameters
    assert get_peft_model(model.unload(), copy.deepcopy(OTHER)).config.rope_parameters == wanted


@pytest.mark.parametrize("tied", [False, True])
def test_merging_an_adapter_that_is_not_active_merges_all_of_it(tied):
    model = train(extend(make(tie_word_embeddings=tied), "first"))
    model.add_adapter("second", LongLoraConfig(r=4, context_length=128))
    model.set_adapter("second")
    second = logits(train(model))
    model.set_adapter("first")
    assert not torch.equal(logits(model), second)
    before = logits(model)
    with pytest.raises(ValueError, match=r"\['first', 'second'\] have their own embeddings or norms.*Name one"):
        model.merge_and_unload(adapter_names=["first", "second"])
    with pytest.raises(ValueError, match=r"names \['third'\], which .* adapters: \['first', 'second'\]"):
        model.merge_and_unload(adapter_names=["third"])
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload(adapter_names=["second"])
    torch.testing.assert_close(logits(merged), second, rtol=1e-4, atol=1e-4)


def test_two_adapters_without_copies_are_merged_together():
    settings = dict(r=4, context_length=128, train_embeddings=False, train_norms=False)
    model = train(extend(make(), "first", **settings))
    model.add_adapter("second", LongLoraConfig(**settings))
    model.set_adapter("second")
    train(model)
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    merged = model.merge_and_unload(adapter_names=["first", "second"])
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=1e-4)


def test_lora_on_a_tied_output_layer_beside_trained_embeddings_is_refused():
    model = make(tie_word_embeddings=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lm_head, which is tied.*Leave lm_head out.*train_embeddings=False"):
        extend(model, target_modules=["q_proj", "lm_head"])
    assert_same(snapshot(model), before)
    train(extend(model, target_modules=["q_proj", "lm_head"], train_embeddings=False))


def test_a_config_of_another_architecture_is_refused():
    config = LongLoraConfig(r=4, context_length=128)
    get_peft_model(make(), config)
    get_peft_model(make(num_hidden_layers=3), config)
    model = make("gpt_neox")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"filled in for llama.*gpt_neox\. Make a new LongLoraConfig"):
        get_peft_model(model, config)
    assert_same(snapshot(model), before)


# -- through transformers' own doors -------------------------------------------------------------------------------


@own_adapters
def test_add_adapter_of_transformers(tmp_path):
    model = make()
    before = snapshot(model)
    model.add_adapter(LongLoraConfig(r=4, context_length=128), adapter_name="longlora")
    assert not torch.equal(logits(model), before["logits"])
    adapted = logits(train(model))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl")) == []
    loaded = make()
    if Version(transformers.__version__) < Version("5.18"):  # which reads no embeddings and norms
        with pytest.raises(NotImplementedError, match=r"embeddings and norms.*PeftModel\.from_pretrained"):
            loaded.load_adapter(str(tmp_path))
        assert torch.equal(logits(loaded), before["logits"])
    else:
        loaded.load_adapter(str(tmp_path))
        assert torch.equal(logits(loaded), adapted)
    wrapped = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(wrapped), adapted)
    model.disable_adapters()
    assert torch.equal(logits(model), before["logits"])
    model.enable_adapters()
    assert torch.equal(logits(model), adapted)
    model.delete_adapter("longlora")
    assert torch.equal(logits(model), before["logits"])


@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda model, config, name: model.add_adapter(config, name), marks=own_adapters),
        lambda model, config, name: inject_adapter_in_model(config, model, name),
    ],
    ids=["add_adapter", "inject_adapter_in_model"],
)
def test_a_base_that_no_peft_model_holds_takes_adapters_one_by_one(add):
    """transformers' add_adapter and PEFT's inject_adapter_in_model make a tuner each; get_peft_model may follow."""
    model = make()
    for name in ("a", "b"):
        add(model, LongLoraConfig(r=4, context_length=128), name)
    wrapped = extend(model, "c")
    assert sorted(wrapped.peft_config) == ["a", "b", "c"]
    assert logits(wrapped).isfinite().all()


@own_adapters
def test_a_plain_lora_beside_it_is_refused():
    model = make()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="plain")
    of_plain = logits(model)
    with pytest.raises(ValueError, match="'plain' of type LORA, which cannot be mixed with LONGLORA"):
        model.add_adapter(LongLoraConfig(r=4, context_length=128), adapter_name="longlora")
    assert list(model.peft_config) == ["plain"]
    assert torch.equal(logits(model), of_plain)


def test_a_base_takes_one_adapter_after_another():
    """Under other names and with another RoPE; nothing of the first is compared with the second."""
    model = make()
    of_base = logits(model)
    extend(model, "first", rope_type="linear").unload()
    second = extend(model, "second", context_length=256)
    assert model.config.rope_parameters["rope_type"] == "yarn"
    second.delete_adapter("second")
    assert torch.equal(logits(model), of_base)


def test_merging_while_switched_off_still_keeps_the_scaled_rope():
    peft_model = train(extend(make()))
    adapted = logits(peft_model)
    with peft_model.disable_adapter():
        merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_model_is_switched_by_itself():
    peft_model = train(extend(make()))
    adapted = logits(peft_model)
    twin = copy.deepcopy(peft_model)
    with twin.disable_adapter():
        assert not torch.equal(logits(twin), adapted)
        assert torch.equal(logits(peft_model), adapted)
    assert torch.equal(logits(twin), adapted)


def test_adapter_folders_hold_no_pickles(tmp_path):
    train(extend(make())).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# -- what LoRA can do stays possible -----------------------------------------------------------------------------------

VARIANTS = {
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "pissa": dict(init_lora_weights="pissa"),
    "lm_head": dict(modules_to_save=["lm_head"]),
    "patterns": dict(alpha_pattern={"q_proj": 32}, rank_pattern={"layers.1.self_attn.v_proj": 2}),
    "replication": dict(layer_replication=[[0, 2], [1, 2]]),
    "mlp": dict(target_modules=["q_proj", "v_proj", "up_proj"]),
    "all-linear": dict(target_modules="all-linear"),
    "lora only": dict(train_embeddings=False, train_norms=False),
    "token indices": dict(train_embeddings=False, trainable_token_indices=[5, 6]),
    "bias": dict(bias="lora_only", train_norms=False),
    "one layer": dict(layers_to_transform=[1]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_lora_is_saved_loaded_and_merged(variant, tmp_path):
    peft_model = train(extend(make(), **VARIANTS[variant]))
    adapted = logits(peft_model)
    sparse = logits(peft_model.train())
    assert (adapted - sparse).abs().max() > 0.1, "training is not sparse"
    peft_model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(loaded), adapted, rtol=1e-4, atol=1e-4)
    if variant == "replication":
        with pytest.raises(ValueError, match="layer_replication"):
            loaded.merge_and_unload()
        return
    torch.testing.assert_close(logits(loaded.merge_and_unload()), adapted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", EXPERTS)
@pytest.mark.parametrize("names", ["new", "old"])
def test_experts_are_trained_saved_loaded_and_merged(model_type, names, tmp_path):
    """Experts are one parameter a layer; configs may still name them as the linear layers they were."""
    if names == "new":
        settings = dict(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    else:
        old = ["w1", "w2", "w3"] if model_type == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
        settings = dict(target_modules=["q_proj", "v_proj", *old])
    peft_model = train(extend(make(model_type, **EXPERTS[model_type]), **settings))
    trained = [name for name, p in peft_model.named_parameters() if p.requires_grad and "experts" in name]
    assert trained
    adapted = logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(model_type, **EXPERTS[model_type]), tmp_path)
    assert torch.equal(logits(loaded), adapted)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), adapted, rtol=1e-3, atol=1e-3)


def test_a_second_adapter_records_rope_of_every_layer_type():
    """As the first does, so that each loads alone onto the base."""
    nested = {kind: {"rope_type": "linear", "factor": 2.0} for kind in ("full_attention", "sliding_attention")}
    base = make(model_type="gemma3_text", head_dim=8, sliding_window=16, num_hidden_layers=6)
    model = get_peft_model(base, LongLoraConfig(r=2, rope_parameters=nested))
    model.add_adapter("second", LongLoraConfig(r=4, rope_parameters=nested))
    first, second = (model.peft_config[name].applied_rope_parameters for name in ("default", "second"))
    assert first == second == base.config.rope_parameters and set(first) == set(nested)

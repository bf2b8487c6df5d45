"""Every way in which an adapter can end gives the base back bit for bit, or is refused when it is asked for."""

import copy

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model
from transformers import AutoModelForCausalLM

from peft_longlora import LongLoraConfig, export_lora
from peft_longlora.adapter import probe
from tests.helpers.every_config import tiny_model
from tests.helpers.tiny import EXPERTS, assert_same, extend, make, snapshot, train

ROWS = torch.arange(3, 99)[None] % 97


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ROWS, use_cache=False).logits


def adapted(**fields) -> PeftModel:
    return train(extend(make(), **fields))


ENDS = {
    "unload": lambda model: model.unload(),
    "delete_adapter": lambda model: model.delete_adapter("default"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "unmerge and unload": lambda model: (model.unmerge_adapter(), model.unload()),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"train_embeddings": False, "train_norms": False}], ids=str)
def test_a_merged_adapter_leaves_the_base_as_it_was(end, fields):
    base = make()
    wanted, before = logits(base), snapshot(base)
    model = train(extend(base, **fields))
    with_adapter = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), with_adapter, atol=1e-4), "merged"
    ENDS[end](model)
    assert torch.equal(logits(base), wanted)
    if "unload" in end:  # the others leave PEFT's empty layers
        assert_same(snapshot(base), before, but=("requires_grad",))


def test_unmerging_puts_the_very_weights_back():
    model = adapted()
    wanted, weight = logits(model), model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    for _ in range(2):
        model.merge_adapter()
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)
    assert model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight is weight
    model.merge_adapter()
    assert torch.allclose(logits(model.merge_and_unload()), wanted, atol=1e-4)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"]])
def test_lora_on_a_tied_layer_is_merged_into_a_weight_of_its_own(targets, tmp_path):
    model = train(extend(make(tie_word_embeddings=True), target_modules=targets, train_embeddings=False))
    wanted = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), wanted, atol=1e-4)
    model.unmerge_adapter()
    core = model.get_base_model()
    head, embeddings = core.get_output_embeddings(), core.get_input_embeddings()
    assert getattr(head, "base_layer", head).weight is getattr(embeddings, "base_layer", embeddings).weight
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), wanted, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted, atol=1e-4)


def test_a_merged_model_that_computes_something_else_is_refused(monkeypatch):
    model = adapted()
    monkeypatch.setattr("peft_longlora.adapter.ending.precision.round_to_half", lambda m: spoil(m))
    with pytest.raises(ValueError, match=r"The merged model does not compute what the adapter does: .* check=False"):
        model.merge_and_unload()
    adapted().merge_and_unload(check=False)


def spoil(module):
    for parameter in module.parameters(recurse=False):
        parameter.data = torch.randn_like(parameter)


def test_the_probe_says_nothing_of_what_it_cannot_see():
    model = make()
    assert probe.Probe.of(model).tokens.shape == (1, probe.TOKENS)
    assert probe.Probe.of(model.to("meta")) is None


@pytest.mark.parametrize("kind", ["yarn", "ntk", "llama3", "linear", "dynamic"])
def test_an_adapter_is_refused_on_the_model_it_was_merged_into(kind, tmp_path):
    model = adapted(rope_type=kind)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    logits(merged)  # "dynamic" notes the longest row
    before = snapshot(merged)
    with pytest.raises(ValueError, match=r"merged into it|has a window|this model has"):
        PeftModel.from_pretrained(merged, tmp_path / "adapter")
    assert_same(snapshot(merged), before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_changes_the_base_stands_alone(init, tmp_path, caplog):
    model = extend(make(), init_lora_weights=init)
    model.save_pretrained(tmp_path)
    wanted = logits(model)
    with pytest.raises(ValueError, match=rf"='{init}' changes the base's weights, on which \['default'\] build"):
        model.load_adapter(tmp_path, "reference")
    assert torch.equal(logits(model), wanted)
    plain = extend(make())
    with pytest.raises(ValueError, match="on which"):
        plain.add_adapter("second", LongLoraConfig(r=4, context_length=128, init_lora_weights=init))


@pytest.mark.parametrize("fields", [{}, {"train_embeddings": False, "train_norms": False}], ids=["copies", "lora"])
def test_pissa_becomes_plain_lora_as_peft_documents_it(fields, tmp_path):
    model = extend(make(), init_lora_weights="olora", **fields)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "init")
    model.peft_config["default"].init_lora_weights = "olora"
    wanted = logits(train(model))
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    assert torch.allclose(logits(PeftModel.from_pretrained(make(), tmp_path / "out")), wanted, atol=1e-4)


def test_pefts_conversion_to_lora_is_refused():
    model = adapted()
    assert not model.supports_lora_conversion()
    with pytest.raises(ValueError, match=r"convert_to_lora would drop the RoPE scaling.*export_lora"):
        convert_to_lora(model, rank=4)


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_folded_into_the_exported_base(tied, tmp_path):
    fields = dict(train_embeddings=False, trainable_token_indices=[3, 5, 9])
    model = train(extend(make(tie_word_embeddings=tied), **fields))
    wanted = logits(model)
    export_lora(model, tmp_path / "lora", fold_into=tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path / "lora")), wanted, atol=1e-5)


def test_a_merged_adapter_is_not_exported(tmp_path):
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the base's weights.*unmerge_adapter\(\)"):
        export_lora(model, tmp_path / "lora", fold_into=tmp_path / "base")


def test_loading_over_an_adapter_with_another_scaling_is_refused(tmp_path):
    """PEFT reads only the weights if the name is taken; a Trainer does this when it resumes."""
    adapted().save_pretrained(tmp_path / "yarn")
    adapted(rope_type="linear").save_pretrained(tmp_path / "linear")
    adapted(group_size=8).save_pretrained(tmp_path / "groups")
    model = PeftModel.from_pretrained(make(), tmp_path / "yarn")
    wanted = logits(model)
    for name, what in (("linear", "RoPE"), ("groups", "attention")):
        with pytest.raises(ValueError, match=f"want different {what} of one model"):
            model.load_adapter(tmp_path / name, "default")
        assert torch.equal(logits(model), wanted)
    model.load_adapter(tmp_path / "yarn", "default")
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(lora_alpha=64), "has lora_alpha=8, and the one in .* was trained with lora_alpha=64"),
        (dict(alpha_pattern={"q_proj": 64}), "has alpha_pattern={}"),
        (dict(use_rslora=True), "use_rslora=True"),
        (dict(use_dora=True), "use_dora=True"),
        (dict(r=2), "r=2"),
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (dict(target_modules=["q_proj"]), "lacks 12 of the 16 tensors"),
        (dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]), "holds 4 tensors .*no place"),
        (dict(train_norms=True), "holds 5 tensors .*no place"),
    ],
)
def test_loading_over_an_adapter_that_computes_otherwise_is_refused(other, said, tmp_path):
    """One with other weights, or with other settings for training, is taken."""
    plain = dict(train_embeddings=False, train_norms=False)
    extend(make(), **{**plain, **other}).save_pretrained(tmp_path / "other")
    train(extend(make(), lora_dropout=0.1, init_lora_weights="gaussian", **plain)).save_pretrained(tmp_path / "same")
    model = extend(make(), **plain)
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        model.load_adapter(tmp_path / "other", "default")
    assert_same(snapshot(model), before)
    model.load_adapter(tmp_path / "same", "default")
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(make(), tmp_path / "same")))


@pytest.mark.parametrize("name", ["embed_tokens", "model.embed_tokens"])
def test_lora_on_embeddings_beside_a_trained_copy_is_refused(name):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"puts LoRA on model.embed_tokens, which holds the embeddings.*=False"):
        extend(model, target_modules=["q_proj", name])
    assert_same(snapshot(model), before)
    extend(model, target_modules=["q_proj", name], train_embeddings=False)


@pytest.mark.parametrize("trained", [False, True], ids=["lora", "copies"])
def test_experts_are_exported_and_folded(trained, tmp_path):
    """Their LoRA wrappers stand in each other."""
    fields = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    base = make("qwen3_moe", **EXPERTS["qwen3_moe"])
    model = train(extend(base, **fields, train_embeddings=trained, train_norms=trained))
    wanted = logits(model)
    export_lora(model, tmp_path / "lora", fold_into=tmp_path / "base")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    assert torch.allclose(logits(loaded), wanted, atol=1e-4)
    assert torch.allclose(logits(model.merge_and_unload()), wanted, atol=1e-3)


def test_layers_that_share_a_weight_are_not_merged():
    """Zamba2's attention layers share their weights, and each gets a LoRA of its own."""
    model = get_peft_model(tiny_model("zamba2"), LongLoraConfig(r=2, context_length=128))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"layers\.1\..* and .*layers\.3\..* share a weight.*Serve the adapter"):
            merge()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())

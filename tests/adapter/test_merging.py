"""`merge_adapter` and its end: whose copies are active, and weights that were cast or moved meanwhile."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from peft_longlora import LongLoraConfig
from tests.helpers.configs import tiny_llama_config
from tests.helpers.tiny import assert_same, extend, logits, make, snapshot, train

PLAIN = dict(train_embeddings=False, train_norms=False)


def two(**fields):
    """A model with trained adapters "default" and "b"; "b" is active."""
    model = train(extend(make(), **fields))
    model.add_adapter("b", LongLoraConfig(r=4, context_length=128, **fields))
    model.set_adapter("b")
    return train(model)


def test_lora_of_one_adapter_is_not_merged_beside_copies_of_another():
    model = two()
    wanted = logits(model)
    with pytest.raises(ValueError, match=r"\['default'\]: .* norms of \['b'\] are active.*set_adapter\('default'\)"):
        model.merge_adapter(["default"])
    assert torch.equal(logits(model), wanted), "nothing was merged"
    model.set_adapter("default")
    wanted = logits(model)
    model.merge_adapter(["default"])
    assert torch.allclose(logits(model), wanted, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), wanted)


def test_lora_without_copies_is_merged_whichever_is_active():
    model = two(train_embeddings=False, train_norms=False)
    model.set_adapter("default")
    wanted = logits(model)
    model.set_adapter("b")
    assert not torch.allclose(logits(model), wanted, atol=1e-3)
    model.merge_adapter(["default"])
    assert torch.allclose(logits(model), wanted, atol=1e-4)


def test_an_unknown_adapter_is_not_merged():
    with pytest.raises(ValueError, match=r"names \['c'\], which .* adapters: \['b', 'default'\]"):
        two().merge_adapter(["c"])


@pytest.mark.parametrize("end", ["unload", "unmerge_adapter", "disable_adapter_layers"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_cast_while_merged_gets_weights_of_that_precision(end, tied):
    base = make(tie_word_embeddings=tied)
    wanted = copy.deepcopy(base).to(torch.bfloat16)
    fields = dict(target_modules=["q_proj", "lm_head"], train_embeddings=False) if tied else {}
    model = train(extend(base, **fields))
    model.merge_adapter()
    model.to(torch.bfloat16)
    getattr(model.base_model, end)()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weight = base.model.layers[0].self_attn.q_proj
    weight = getattr(weight, "base_layer", weight).weight
    assert torch.equal(weight, wanted.model.layers[0].self_attn.q_proj.weight)
    logits(base)
    if end == "unload":
        found, wanted = base.state_dict(), wanted.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("fields", [{}, dict(train_embeddings=False, train_norms=False)], ids=["copies", "lora"])
def test_another_adapter_made_active_while_one_is_merged_is_computed_alone(fields):
    model = two(**fields)
    wanted = logits(model)
    model.set_adapter("default")
    of_default = logits(model)
    model.merge_adapter()
    model.set_adapter("b")
    assert torch.equal(logits(model), wanted), "bit for bit, which PEFT's own unmerging is not"
    model.merge_adapter()
    model.set_adapter("default")
    assert torch.equal(logits(model), of_default)


def test_merging_again_sets_aside_what_the_first_merge_did_not():
    base = make()
    wanted = copy.deepcopy(base).state_dict()
    fields = dict(train_embeddings=False, train_norms=False)
    model = train(extend(base, target_modules=["q_proj"], **fields))
    model.add_adapter("b", LongLoraConfig(r=4, context_length=128, target_modules=["q_proj", "o_proj"], **fields))
    model.merge_adapter(["default"])
    weights = model.base_model._state.set_aside
    assert len(weights) == 2, "one q_proj a layer, no bias and no o_proj"
    model.merge_adapter(["b"])
    assert len(model.base_model._state.set_aside) == 4
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.unload().state_dict().items())


def test_a_bias_that_merging_changes_is_set_aside_too():
    base = make("qwen2")
    wanted = copy.deepcopy(base).state_dict()
    model = train(extend(base, lora_bias=True, target_modules=["q_proj", "v_proj"]))
    before = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-4)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.unload().state_dict().items())


def test_a_merged_adapter_is_not_trained_in_part():
    """LoRA is in the base's weights, so only embeddings and norms would learn."""
    model = train(extend(make()))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"LoRA would not be trained.*unmerge_adapter\(\)"):
        model.train()(input_ids=torch.arange(3, 40)[None])
    with torch.no_grad():
        model(input_ids=torch.arange(3, 40)[None])
    model.unmerge_adapter()
    train(model)


def test_weights_are_not_loaded_into_a_merged_adapter(tmp_path):
    model = train(extend(make()))
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged.*unmerge_adapter\(\)"):
        model.load_adapter(tmp_path, "default")


def test_trained_tokens_are_merged_and_come_off():
    base = make()
    wanted = copy.deepcopy(base).state_dict()
    model = train(extend(base, train_embeddings=False, trainable_token_indices=[3, 5]))
    before = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-4)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.unload().state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_of_tied_embeddings_merge(tied):
    """PEFT puts a layer into the embeddings and into the output layer; both have the same change of one weight."""
    torch.manual_seed(0)
    frozen = dict(train_embeddings=False, train_norms=False, init_lora_weights=False)
    config = LongLoraConfig(r=2, trainable_token_indices=[1, 2, 3], group_size=4, task_type="CAUSAL_LM", **frozen)
    model = get_peft_model(LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=tied)).eval(), config).eval()
    for name, weight in model.named_parameters():
        if "trainable_tokens" in name:
            torch.nn.init.normal_(weight)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"combination_type": "cat"}, {"combination_type": "svd", "svd_rank": 6}])
def test_a_weighted_sum_of_adapters_is_their_sum(options):
    model = extend(make(), "a", **PLAIN)
    model.add_adapter("b", LongLoraConfig(r=2, context_length=128, lora_alpha=3, **PLAIN))
    for name in ("a", "b"):
        model.set_adapter(name)
        train(model)
    model.base_model.set_adapter(["a", "b"])
    both = logits(model)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", **options)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, atol=1e-4, rtol=1e-4)
    assert model.peft_config["sum"].applied_rope_parameters == model.peft_config["a"].applied_rope_parameters


@pytest.mark.parametrize(
    "more",
    [
        {"train_norms": True},
        {"trainable_token_indices": [3, 4]},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"rope_type": "learned"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_a_weighted_sum_would_leave_out_is_refused(more):
    """PEFT leaves it out, or scales it otherwise, and says nothing."""
    model = train(extend(make(), "a", **{**PLAIN, **more}))
    before = snapshot(model)
    name = "modules_to_save" if more.keys() & {"train_norms", "rope_type"} else next(iter(more))
    with pytest.raises(ValueError, match=f"Adapter 'a' is more than plain LoRA .*{name}=.*Merge 'a' alone"):
        model.add_weighted_adapter(["a"], [1.0], "half", combination_type="cat")
    assert list(model.peft_config) == ["a"]
    assert_same(snapshot(model), before)


def test_adapters_that_wait_for_different_tokens_are_not_added_up():
    model = extend(make(), "a", alora_invocation_tokens=[5], **PLAIN)
    model.add_adapter("b", LongLoraConfig(r=4, context_length=128, alora_invocation_tokens=[6], **PLAIN))
    with pytest.raises(ValueError, match=r"\['a', 'b'\] have different alora_invocation_tokens"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="cat")
    model.add_weighted_adapter(["a"], [0.5], "c", combination_type="cat")
    assert model.peft_config["c"].alora_invocation_tokens == [5]

"""`merge_adapter` and its end: whose copies are active, and weights that were cast or moved meanwhile."""

import copy

import pytest
import torch

from peft_longlora import LongLoraConfig
from tests.helpers.tiny import extend, logits, make, train


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
    with pytest.raises(ValueError, match=r"names \['c'\]; there are \['b', 'default'\]"):
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

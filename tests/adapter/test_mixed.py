"""Batches whose rows belong to several adapters and to the base: each row is what it is alone."""

import pytest
import torch
from peft import get_peft_model

from peft_longlora import LongLoraConfig, use_attention
from tests.helpers.tiny import extend, make, train

ROWS = torch.randint(3, 97, (3, 96), generator=torch.Generator().manual_seed(2))
NAMES = ["__base__", "default", "__base__"]
MODELS = {
    "llama": {},
    "gpt_neox": dict(rotary_pct=0.5),
    "gemma3_text": dict(head_dim=16, layer_types=["sliding_attention", "full_attention"], sliding_window=32),
}


@torch.no_grad()
def logits(model, rows=ROWS, **options):
    return model.eval()(input_ids=rows, use_cache=False, **options).logits


def alone(model):
    """Each row by itself."""
    with model.disable_adapter():
        base = logits(model)
    return torch.stack([(base if name == "__base__" else logits(model))[row] for row, name in enumerate(NAMES)])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["yarn", "linear", "ntk", "dynamic", "llama3"])
def test_rows_of_the_base_have_its_rope(name, kind):
    if name == "gemma3_text" and kind == "dynamic":
        pytest.skip("transformers has no dynamic RoPE for it")
    model = train(extend(make(name, **MODELS[name]), rope_type=kind, train_norms=False))
    wanted, other = alone(model), logits(model)
    found = logits(model, adapter_names=NAMES)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found[0] - other[0]).abs().max() > 0.1
    torch.testing.assert_close(logits(model), other)  # nothing stays behind


def test_without_a_scaling_pefts_own_way_is_enough():
    base = make()
    wanted = logits(base)
    model = train(get_peft_model(base, LongLoraConfig(r=4, train_norms=False)))
    found = logits(model, adapter_names=NAMES)
    torch.testing.assert_close(found[::2], wanted[::2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[1], wanted[1], atol=1e-3)


@pytest.mark.parametrize("options", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
def test_generation_goes_on_with_each_rows_rope(options):
    model = train(extend(make(), train_norms=False, train_embeddings=False))
    how = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ROWS), **options)
    found = model.generate(input_ids=ROWS, adapter_names=NAMES, **how)
    with model.disable_adapter():
        base = model.generate(input_ids=ROWS, **how)
    adapted = model.generate(input_ids=ROWS, **how)
    assert torch.equal(found[0], base[0]) and torch.equal(found[2], base[2]) and torch.equal(found[1], adapted[1])
    assert not torch.equal(base[1], adapted[1])


def test_a_cache_keeps_each_rows_rope():
    model = train(extend(make(), train_norms=False, train_embeddings=False))
    with torch.no_grad():
        first = model(input_ids=ROWS[:, :70], adapter_names=NAMES, use_cache=True)
        name = "past_key_values" if "past_key_values" in first else "cache"
        rest = model(input_ids=ROWS[:, 70:], adapter_names=NAMES, **{name: first[name]}).logits
    torch.testing.assert_close(rest, alone(model)[:, 70:], rtol=1e-4, atol=1e-4)


def test_trained_norms_are_refused_by_name():
    model = train(extend(make()))
    with pytest.raises(ValueError, match=r"adapter_names=.* copy of every LlamaRMSNorm.*train_norms=False"):
        logits(model, adapter_names=NAMES)
    with pytest.raises(ValueError, match="train_norms=False"):
        model.generate(input_ids=ROWS, adapter_names=["default"] * 3, max_new_tokens=2)


def test_the_base_is_not_asked_to_be_sparse():
    model = train(extend(make(), train_norms=False))
    with use_attention(model, "sparse"), pytest.raises(ValueError, match="the base is dense"):
        logits(model, adapter_names=NAMES)


def test_names_that_do_not_fit_the_rows_are_pefts_to_refuse():
    model = train(extend(make(), train_norms=False))
    with pytest.raises(ValueError, match=r"adapter_names.*should be the same as"):
        logits(model, adapter_names=NAMES[:2])


def test_learned_ropes_are_not_mixed():
    model = train(extend(make(), rope_type="learned", train_norms=False))
    with pytest.raises(ValueError, match="learned their RoPE"):
        logits(model, adapter_names=NAMES)

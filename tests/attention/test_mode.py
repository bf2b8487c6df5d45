"""`use_attention`: what each mode computes, that it is undone, and what it refuses."""

import pytest
import torch
from peft import get_peft_model

from peft_longlora import LongLoraConfig, use_attention
from tests.helpers.attention_models import LENGTH, assert_differ, build, inputs_of, sparse
from tests.helpers.releases import CACHE


def test_every_mode_in_training_and_evaluation():
    model, stock = sparse("llama"), build("llama")
    inputs, _ = inputs_of("packed")
    sparse_logits, dense_logits = model(**inputs).logits, stock(**inputs).logits
    assert_differ(sparse_logits, dense_logits)
    for training in (True, False):
        model.train(training)
        with use_attention(model, "sparse"):
            assert torch.equal(model(**inputs).logits, sparse_logits)
        with use_attention(model, "dense"):
            model.train(training)
            assert torch.equal(model(**inputs).logits, dense_logits)
        with use_attention(model, "auto"):
            assert torch.equal(model(**inputs).logits, sparse_logits if training else dense_logits)
    model.eval()
    with use_attention(model, "dense"):
        model.train()  # a trainer inside the block
        assert torch.equal(model(**inputs).logits, dense_logits)


def test_it_is_undone_after_errors_and_nests():
    model = sparse("llama")
    inputs, _ = inputs_of("plain")
    before = model(**inputs).logits
    with pytest.raises(RuntimeError, match="mine"), use_attention(model, "dense"):
        raise RuntimeError("mine")
    assert torch.equal(model(**inputs).logits, before)
    with use_attention(model, "dense"):
        dense = model(**inputs).logits
        with use_attention(model, "sparse"):
            assert torch.equal(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, dense)


def test_sparse_prefill_then_dense_decoding():
    """ "sparse" holds for the prompt too; what decodes behind it sees the whole cache."""
    model = sparse("llama").eval()
    tokens = torch.randint(3, 97, (1, LENGTH))
    with torch.no_grad(), use_attention(model, "sparse"):
        prefill = model(tokens, use_cache=True)
        assert torch.equal(prefill.logits, model(tokens, use_cache=False).logits)
        assert model(tokens[:, :1], **{CACHE: prefill[CACHE]}).logits.isfinite().all()


@pytest.mark.parametrize("mode", ["Sparse", "", None])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(ValueError, match=r"mode=.*'auto', 'sparse' or 'dense'"), use_attention(sparse("llama"), mode):
        pass


def test_a_model_without_s2_attn_is_refused():
    with (
        pytest.raises(ValueError, match=r"does not use S2-Attn.*attn_implementation='s2_attn'"),
        use_attention(build("llama"), "sparse"),
    ):
        pass


def test_sparse_is_refused_while_the_adapter_is_off(llama):
    model = get_peft_model(llama, LongLoraConfig(r=2, context_length=128))
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match=r"disabled.*Leave disable_adapter"),
        use_attention(model, "sparse"),
    ):
        pass

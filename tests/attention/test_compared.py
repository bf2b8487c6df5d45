"""A forward without gradients that a loss compares with a training forward runs as that one, dense or with skips."""

import logging

import pytest
import torch
from transformers.utils import logging as transformers_logging

from peft_longlora import use_attention
from peft_longlora.attention.settings import settings_on
from tests.helpers.tiny import extend, make

GENERATOR = torch.Generator().manual_seed(5)
ROWS = [torch.randint(3, 97, (2, 96), generator=GENERATOR) for _ in range(6)]
FIELDS = dict(attention_pattern="local", group_size=16, init_lora_weights=False)


def adapted(**fields):
    return extend(make(), **{**FIELDS, **fields}).train()


def reference(model, ids, **inputs):
    """Logits of a model in training mode, as a trainer computes a reference."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


@pytest.mark.parametrize("skips", [False, True])
def test_a_reference_is_computed_as_the_training_forward_before_it(skips):
    model, plain = adapted(dense_every=3, skip_positions=skips), adapted()
    for number, ids in enumerate(ROWS, 1):
        trained = model(input_ids=ids, use_cache=False).logits
        # A copy, as trainers make; nothing was trained since, so every token must have the same logits.
        torch.testing.assert_close(reference(model, ids.clone()), trained.detach(), rtol=1e-5, atol=1e-5)
        if number % 3 == 0:
            with use_attention(plain, "dense"):
                torch.testing.assert_close(reference(model, ids), reference(plain, ids), rtol=1e-5, atol=1e-5)


def test_another_row_is_no_reference_and_is_warned_of_once(caplog):
    model, plain = adapted(dense_every=2), adapted()
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            for ids, other in zip(ROWS[::2], ROWS[1::2], strict=True):
                model(input_ids=ids, use_cache=False)
                assert torch.equal(reference(model, other), reference(plain, other))
                assert torch.equal(reference(model, other[:, :50]), reference(plain, other[:, :50]))
    finally:
        transformers_logging.disable_propagation()
    assert [r.message.count("leave dense_every and skip_positions out") for r in caplog.records] == [1]


def test_a_forward_that_failed_is_no_training_forward_to_compare_with():
    model, plain = adapted(dense_every=1), adapted()
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ROWS[0], use_cache=False)
    handle.remove()
    assert torch.equal(reference(model, ROWS[0]), reference(plain, ROWS[0]))


def test_the_base_is_not_counted():
    """A loss that trains through the base's logits too, as a penalty does, must not move the schedule."""
    model, plain = adapted(dense_every=2), adapted()
    for number, ids in enumerate(ROWS[:4], 1):
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        with use_attention(plain, "auto" if number % 2 else "dense"):
            expected = plain(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert settings_on(model.get_base_model()).training_forwards == 4

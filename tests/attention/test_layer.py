"""What follows from one call of a layer: its mode, kept for recomputation; and rows with padding inside a document."""

import gc
import weakref

import pytest
import torch

from peft_longlora import configure_attention, use_attention
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.mask import S2Mask
from tests.helpers.attention_models import G, assert_differ, assert_same, build, logits_and_gradients, sparse
from tests.helpers.plain_kernel import PlainKernel, install
from tests.helpers.releases import checkpoint_activations

TOKENS = torch.randint(3, 97, (2, 23), generator=torch.Generator().manual_seed(1))


# -- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [[0], [1], [0, 2], [0, 1, 2]])
def test_each_layer_is_sparse_if_it_trains(frozen):
    """A frozen layer in evaluation mode is dense, whichever it is, and the others are not."""
    model, plain = build("llama", num_hidden_layers=3), build("llama", num_hidden_layers=3)
    configure_attention(model.train(), group_size=G)
    configure_attention(plain, group_size=G, dense_layers=frozen)
    for index in frozen:
        model.model.layers[index].eval()
    inputs, is_real = dict(input_ids=TOKENS, use_cache=False), torch.ones_like(TOKENS, dtype=torch.bool)
    assert_same(logits_and_gradients(model, inputs, is_real), logits_and_gradients(plain.train(), inputs, is_real))


def with_mask(kind: str) -> dict:
    mask = {"none": None, "2-D": torch.ones_like(TOKENS), "4-D": torch.ones(2, 1, 23, 23, dtype=torch.bool).tril()}
    return dict(input_ids=TOKENS, attention_mask=mask[kind], use_cache=False)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["none", "2-D", "4-D"])
def test_a_backward_outside_of_use_attention_recomputes_what_was_computed(kind, reentrant):
    model = sparse("llama")
    checkpoint_activations(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    inputs = with_mask(kind)
    expected = logits_and_gradients(build("llama").train(), inputs, TOKENS > 0)
    with use_attention(model, "dense"):
        logits = model(**inputs).logits[TOKENS > 0]
    if kind != "4-D":  # another forward comes in between
        model(**inputs)
    logits.sin().sum().backward()
    assert_same((logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)


def test_one_4d_mask_serves_forwards_of_several_modes():
    model, inputs = sparse("llama"), with_mask("4-D")
    with use_attention(model, "dense"):
        model(**inputs)
    with pytest.raises(ValueError, match="cannot be cut into groups"):
        model(**inputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_without_a_mask_recompute_what_the_last_call_computed(reentrant, monkeypatch):
    """As an architecture that makes no mask calls them."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda *args, **kwargs: None)
    model = sparse("llama")
    checkpoint_activations(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    inputs = dict(input_ids=TOKENS, use_cache=False)
    expected = logits_and_gradients(build("llama").train(), inputs, TOKENS > 0)
    with use_attention(model, "dense"):
        logits = model(**inputs).logits[TOKENS > 0]
    logits.sin().sum().backward()
    assert_same((logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)
    assert_differ(model(**inputs).logits[TOKENS > 0], logits)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["s2", "full", "adaptive"])
def test_what_a_forward_knows_goes_with_it(pattern, monkeypatch):
    """Not when Python next collects its garbage: masks and plans hold memory of the GPU."""
    found, init = [], S2Mask.__init__

    def record(self, arguments):
        init(self, arguments)
        found.append(weakref.ref(self))

    monkeypatch.setattr(S2Mask, "__init__", record)
    model = sparse("gemma3_text", pattern=pattern)
    gc.disable()
    try:
        model(**with_holes()).logits.sum().backward()
        assert len(found) >= 2 and not [one for one in found if one() is not None]
    finally:
        gc.enable()


# -- padding inside a document -----------------------------------------------------------------------------------


def with_holes() -> dict:
    mask = torch.ones_like(TOKENS)
    mask[0, 5] = mask[0, 9:11] = mask[1, :4] = mask[1, 12] = mask[1, 20:] = 0
    return dict(input_ids=TOKENS, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("pattern", ["s2", "local", "full"])
def test_padding_inside_a_document_is_left_out_and_does_not_end_it(name, pattern):
    """The truth: each row without its padding, whose tokens keep their positions."""
    inputs = with_holes()
    is_real = inputs["attention_mask"] > 0
    model = sparse(name, pattern=pattern)
    if name == "gemma3_text":  # a window of the layer's own counts padding, as transformers has it
        for module in find_attention_modules(model).values():
            module.sliding_window = None
        model.config.layer_types = ["full_attention"] * 2
    found = logits_and_gradients(model, inputs, is_real)
    rows = []
    for tokens, real in zip(TOKENS, is_real, strict=True):
        at = real.nonzero().squeeze(1)
        # positions of a document that starts at 0 and jumps would end it, so the rotary positions alone jump
        rows.append(by_rotary(model, tokens[at][None], at[None]))
    torch.testing.assert_close(found[0], torch.cat(rows), rtol=2e-4, atol=2e-4)


def by_rotary(model, tokens, positions):
    rotary = model.get_decoder().rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids, *more: forward(x, positions, *more)
    try:
        return model(input_ids=tokens, use_cache=False).logits[0]
    finally:
        del rotary.forward


def test_a_short_document_with_padding_inside_loses_nothing(caplog):
    inputs = with_holes()
    is_real = inputs["attention_mask"] > 0
    model = build("llama")
    configure_attention(model, group_size=64)
    expected = logits_and_gradients(build("llama").train(), inputs, is_real)
    assert_same(logits_and_gradients(model.train(), inputs, is_real), expected)
    with use_attention(model, "dense", dense_attention="fastest"):
        assert_same(logits_and_gradients(model, inputs, is_real), expected)


def test_padding_inside_a_document_is_told_with_its_cure(monkeypatch):
    from peft_longlora.attention import mask as module

    said = []
    monkeypatch.setattr(module.logger, "warning_once", said.append)
    model, inputs = sparse("llama"), with_holes()
    model(**inputs)
    assert len(said) == 1 and "give the tokenizer its own pad token" in said[0]
    inputs["attention_mask"] = torch.ones_like(TOKENS)
    model(**inputs)
    model(input_ids=TOKENS)
    assert len(said) == 1


def test_compiled_code_leaves_padding_inside_a_document_out_too(monkeypatch):
    install(monkeypatch, PlainKernel(True, True))
    torch._dynamo.reset()
    model, compiled = sparse("llama", backend="plain"), sparse("llama", backend="plain")
    compiled.compile(backend="eager", fullgraph=True)
    inputs = with_holes()
    is_real = inputs["attention_mask"] > 0
    assert_same(logits_and_gradients(compiled, inputs, is_real), logits_and_gradients(model, inputs, is_real))

"""Whole models with "s2_attn" wherever they do not train sparse: equal to stock sdpa, or through the fastest kernel."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    Cache,
)
from transformers.cache_utils import QuantizedLayer

from peft_longlora import LongLoraConfig, configure_attention, use_attention
from peft_longlora.attention import dense, forward
from peft_longlora.attention.trial import TOKENS
from tests.helpers.attention_models import (
    CONFIGS,
    LENGTH,
    ROWS,
    G,
    assert_same,
    build,
    inputs_of,
    logits_and_gradients,
    sparse,
)
from tests.helpers.every_config import tiny_model
from tests.helpers.releases import CACHE

# -- evaluation and generation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_equals_stock_sdpa_exactly(name, row):
    inputs, _ = inputs_of(row)
    with torch.no_grad():
        mine = sparse(name).eval()(**inputs).logits
        assert torch.equal(mine, build(name).eval()(**inputs).logits)


@pytest.mark.parametrize("cache", [None, "static", "no cache"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text", "mistral"])
def test_generation_equals_stock_sdpa(name, cache):
    """Greedy, one row left padded: the same tokens and the same scores."""
    tokens = torch.randint(3, 97, (2, 9))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    how = dict(use_cache=False) if cache == "no cache" else dict(cache_implementation=cache)
    results = [
        model.eval().generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **how,
        )
        for model in (sparse(name), build(name))
    ]
    assert torch.equal(results[0].sequences, results[1].sequences)
    for mine, stock in zip(results[0].scores, results[1].scores, strict=True):
        assert torch.equal(mine, stock)


def test_decoding_with_a_cache_is_dense_while_training():
    """Online RL samples from a model in training mode: a step behind a cache has fewer queries than keys."""
    model, stock = sparse("llama"), build("llama").train()
    tokens = torch.randint(3, 97, (2, LENGTH))
    with torch.no_grad():
        with use_attention(model, "dense"):
            mine = model(tokens[:, :-1], use_cache=True)
        theirs = stock(tokens[:, :-1], use_cache=True)
        step, expected = (m(tokens[:, -1:], **{CACHE: out[CACHE]}) for m, out in ((model, mine), (stock, theirs)))
    assert torch.equal(step.logits, expected.logits)


def test_dense_attention_is_what_the_model_had():
    """A model loaded with eager evaluates as eager: weights included, bit for bit."""
    inputs, _ = inputs_of("left padded")
    stock, model = build("llama", "eager").eval(), build("llama", "eager").eval()
    configure_attention(model, group_size=G)
    mine, expected = model(**inputs, output_attentions=True), stock(**inputs, output_attentions=True)
    assert torch.equal(mine.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(mine.attentions, expected.attentions, strict=True))


# -- dense attention through the fastest kernel --------------------------------------------------------------------


@pytest.fixture
def kernel_calls(monkeypatch) -> list[int]:
    """The numbers of query tokens of all calls that went to a kernel of this package."""
    calls, attend = [], dense.attend_in_groups

    def count(query, *args, **kwargs):
        if query.shape[2] != TOKENS:  # of the trial of a model
            calls.append(query.shape[2])
        return attend(query, *args, **kwargs)

    for module, name in ((dense, "attend_in_groups"), (forward, "attend")):
        monkeypatch.setattr(module, name, count)
    return calls


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_fastest_kernel_evaluates_as_stock_sdpa_does(name, row, kernel_calls):
    inputs, segment_ids = inputs_of(row)
    model = sparse(name, dense_attention="fastest").eval()
    with torch.no_grad():
        mine, stock = model(**inputs).logits, build(name).eval()(**inputs).logits
    torch.testing.assert_close(mine[segment_ids > 0], stock[segment_ids > 0], rtol=2e-5, atol=2e-5)
    assert kernel_calls == [LENGTH] * 2


class Int8Layer(QuantizedLayer):
    """A quantised cache that needs no package: 8 bits, one scale a vector."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, tensor):
        return tensor[0] * tensor[1]


def cache_of(kind: str, model) -> dict:
    layers = model.config.num_hidden_layers
    return {
        "dynamic": {},
        "static": dict(cache_implementation="static"),
        "quantised": {CACHE: Cache(layers=[Int8Layer(residual_length=4) for _ in range(layers)])},
        "none": dict(use_cache=False),
    }[kind]


@pytest.mark.parametrize("cache", ["dynamic", "static", "quantised", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3_text"])
def test_the_fastest_kernel_generates_what_stock_sdpa_does(name, cache, kernel_calls):
    """Greedy, one row left padded. The prompt goes through the kernel wherever no cache stands in front of it."""
    tokens = torch.randint(3, 97, (2, 9))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    how = dict(attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_scores=True)
    mine, stock = sparse(name, dense_attention="fastest").eval(), build(name).eval()
    found, wanted = (
        m.generate(tokens, **how, **cache_of(cache, m), return_dict_in_generate=True) for m in (mine, stock)
    )
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    static = [9] if name == "gemma3_text" else []  # the cache of a layer with a window is no longer than the prompt
    lengths = {"static": static, "none": [9 + step for step in range(8) for _ in range(2)]}.get(cache, [9, 9])
    assert kernel_calls == lengths


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon_h1", "cohere2"])
def test_eager_attention_with_a_static_cache_generates_what_stock_does(name):
    """transformers makes the masks of a static cache as for sdpa: none for a prompt in an empty cache."""
    model, stock = (tiny_model(name, attention="eager") for _ in range(2))
    configure_attention(model, group_size=8)
    prompt = torch.arange(3, 43)[None]
    how = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, output_scores=True, return_dict_in_generate=True)
    found, wanted = (m.eval().generate(prompt, **how, cache_implementation="static") for m in (model, stock))
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_the_fastest_kernel_for_a_while_and_in_training(kernel_calls):
    model, stock = sparse("llama"), build("llama").train()
    inputs, segment_ids = inputs_of("packed")
    expected = logits_and_gradients(stock, inputs, segment_ids > 0)
    with use_attention(model, "dense", dense_attention="fastest"):
        assert_same(logits_and_gradients(model, inputs, segment_ids > 0), expected)
        assert len(kernel_calls) == 2
    with use_attention(model, "dense"):
        assert torch.equal(model(**inputs).logits[segment_ids > 0], expected[0])
    assert len(kernel_calls) == 2
    configure_attention(model, group_size=G, dense_attention="fastest")
    configure_attention(model, group_size=G)  # leaves what stands there
    with use_attention(model, "dense"):
        model(**inputs)
    assert len(kernel_calls) == 4
    refusal = pytest.raises(ValueError, match=r"dense_attention='sdpa'.*'fastest'.*configure_attention")
    with refusal, use_attention(model, "dense", dense_attention="sdpa"):
        pass


def test_what_the_fastest_kernel_cannot_express_stays_with_stock(kernel_calls):
    """A mask that lets tokens see later ones, and a 4-D mask of the user's."""
    model, stock = sparse("llama", dense_attention="fastest").eval(), build("llama").eval()
    inputs, _ = inputs_of("plain")
    prefix = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    prefix[:5, :5] = True
    for more in (dict(is_causal=False), dict(attention_mask=prefix[None, None].expand(2, 1, -1, -1))):
        with torch.no_grad():
            assert torch.equal(model(**inputs, **more).logits, stock(**inputs, **more).logits)
    assert not kernel_calls


def test_a_disabled_adapter_gives_the_base_back_bit_for_bit(llama, kernel_calls):
    inputs, _ = inputs_of("left padded")
    with torch.no_grad():
        before = llama(**inputs).logits
        configured = LongLoraConfig(group_size=G, task_type="CAUSAL_LM")
        model = get_peft_model(llama, configured).eval()
        with use_attention(model, "auto", dense_attention="fastest"):
            model(**inputs)
            assert len(kernel_calls) == 2
            with model.disable_adapter():
                assert torch.equal(model(**inputs).logits, before)
    assert len(kernel_calls) == 2

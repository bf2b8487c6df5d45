"""Whole models with "s2_attn": training equals the reference, everything else equals stock sdpa."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    Cache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    PersimmonConfig,
    PersimmonForCausalLM,
    Qwen3Config,
)
from transformers.cache_utils import QuantizedLayer

from peft_longlora import LongLoraConfig, configure_attention, s2_attention, use_attention
from peft_longlora.attention import dense, forward
from peft_longlora.reference import s2_attention_reference
from tests.helpers.configs import tiny_llama_config
from tests.helpers.plain_kernel import PlainKernel, install
from tests.helpers.releases import CACHE, checkpoint_activations

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
CONFIGS = {
    "llama": tiny_llama_config(),
    "llama 9/3": tiny_llama_config(hidden_size=36, num_attention_heads=9, num_key_value_heads=3),
    "llama 1 KV head": tiny_llama_config(num_key_value_heads=1),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),  # q and k norms
    "gpt_neox": GPTNeoXConfig(**SIZES, rotary_pct=0.5),  # partial rotary, no GQA
    "gemma3_text": Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5),  # every layer has a window
}
G = 6
LENGTH = 23


def positions(*lengths: int) -> list[int]:
    return [p for length in lengths for p in range(length)]


def ids(*lengths: int) -> list[int]:
    return [n + 1 for n, length in enumerate(lengths) for _ in range(length)]


# name: (what the model is given, the segment ids that it means)
ROWS = {
    "plain": ({}, [ids(LENGTH)] * 2),
    "packed": (dict(position_ids=[positions(4, 13, 6), positions(17, 6)]), [ids(4, 13, 6), ids(17, 6)]),
    "packed, with a mask and a cache": (
        dict(position_ids=[positions(4, 13, 6)], attention_mask=[[1] * LENGTH], use_cache=True),
        [ids(4, 13, 6)],
    ),
    "left padded": (dict(attention_mask=[[0] * 9 + [1] * 14, [1] * LENGTH]), [[0] * 9 + ids(14), ids(LENGTH)]),
    "right padded": (dict(attention_mask=[[1] * 14 + [0] * 9, [1] * LENGTH]), [ids(14) + [0] * 9, ids(LENGTH)]),
    "packed and padded": (
        dict(attention_mask=[[0] * 2 + [1] * 18 + [0] * 3], position_ids=[[0, 0, *positions(11, 7), 0, 0, 0]]),
        [[0] * 2 + ids(11, 7) + [0] * 3],
    ),
}


@pytest.fixture(scope="module")
def reference():
    """A throw-away attention that transformers calls and that calls the reference; the test says who is where."""
    settings = {}

    def forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        segments, window = settings["segment_ids"], kwargs.get("sliding_window")
        if window is None:
            pattern = settings.get("patterns", {}).get(module.layer_idx, settings.get("pattern", "s2"))
            inputs = dict(segment_ids=segments, scaling=scaling, pattern=pattern)
            return s2_attention_reference(query, key, value, G, **inputs), None
        position = torch.arange(query.shape[2])
        distance = position[:, None] - position[None, :]
        same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
        mask = (same & (distance >= 0) & (distance < window))[:, None]
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, -1e30)
        return (scores.softmax(-1).masked_fill(~mask, 0) @ value).transpose(1, 2), None

    AttentionInterface.register("s2_test_reference", forward)
    AttentionMaskInterface.register("s2_test_reference", lambda **kwargs: None)
    yield settings
    del AttentionInterface._global_mapping["s2_test_reference"]
    del AttentionMaskInterface._global_mapping["s2_test_reference"]


def build(name: str, attention: str = "sdpa", **kwargs):
    """The same weights whatever the attention."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    for field, value in kwargs.items():
        setattr(config, field, value)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def sparse(name: str, **kwargs):
    model = build(name)
    configure_attention(model, group_size=G, **kwargs)
    return model.train()


def inputs_of(row: str) -> tuple[dict, torch.Tensor]:
    given, segment_ids = ROWS[row]
    segment_ids = torch.tensor(segment_ids)
    given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()}
    tokens = torch.randint(3, 97, segment_ids.shape, generator=torch.Generator().manual_seed(1))
    return dict(input_ids=tokens, use_cache=False) | given, segment_ids


def logits_and_gradients(model, inputs, is_real):
    """Logits at tokens that are no padding, and all gradients of a loss on them."""
    logits = model(**inputs).logits[is_real]
    model.zero_grad()
    logits.sin().sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, tolerance=2e-5):
    torch.testing.assert_close(first[0], second[0], rtol=tolerance, atol=tolerance)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(
            gradient, second[1][name], rtol=5e-4, atol=5e-5, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


def assert_differ(first, second):
    assert (first - second).abs().max() > 1e-4


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", CONFIGS)
def test_training_equals_the_reference(name, row, reference):
    inputs, segment_ids = inputs_of(row)
    reference.clear()
    reference["segment_ids"] = segment_ids
    is_real = segment_ids > 0
    expected = logits_and_gradients(build(name, "s2_test_reference").train(), inputs, is_real)
    assert_same(logits_and_gradients(sparse(name), inputs, is_real), expected)


@pytest.mark.parametrize("pattern", ["local", "full"])
def test_other_patterns_equal_the_reference(pattern, reference):
    inputs, segment_ids = inputs_of("packed")
    reference.clear()
    reference.update(segment_ids=segment_ids, pattern=pattern)
    expected = logits_and_gradients(build("llama", "s2_test_reference").train(), inputs, segment_ids > 0)
    assert_same(logits_and_gradients(sparse("llama", pattern=pattern), inputs, segment_ids > 0), expected)


@pytest.mark.parametrize("dense_layers", [[0], [1], [0, 1]])
def test_dense_layers_stay_dense(dense_layers, reference):
    inputs, segment_ids = inputs_of("packed and padded")
    reference.clear()
    reference.update(segment_ids=segment_ids, patterns=dict.fromkeys(dense_layers, "full"))
    is_real = segment_ids > 0
    expected = logits_and_gradients(build("llama", "s2_test_reference").train(), inputs, is_real)
    assert_same(logits_and_gradients(sparse("llama", dense_layers=dense_layers), inputs, is_real), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_packed_rows_equal_their_documents_alone(name):
    model = sparse(name)
    lengths = (4, 13, 6)
    inputs, _ = inputs_of("packed, with a mask and a cache")
    alone = [model(part, use_cache=False).logits for part in inputs["input_ids"].split(lengths, dim=1)]
    torch.testing.assert_close(model(**inputs).logits, torch.cat(alone, dim=1), rtol=2e-5, atol=2e-5)


def test_rows_of_padding_give_no_nan():
    model = sparse("llama")
    mask = torch.tensor([[1] * LENGTH, [0] * LENGTH])
    logits, gradients = logits_and_gradients(
        model, dict(input_ids=torch.ones(2, LENGTH, dtype=torch.long), attention_mask=mask), mask == 1
    )
    assert logits.isfinite().all() and all(g.isfinite().all() for g in gradients.values())


def test_a_model_loaded_as_s2_attn_trains_sparse_with_a_quarter_of_its_window():
    inputs, _ = inputs_of("plain")
    loaded, configured = build("llama", "s2_attn").train(), build("llama")
    configure_attention(configured, group_size=64 // 4)
    assert torch.equal(loaded(**inputs).logits, configured.train()(**inputs).logits)
    assert_differ(loaded(**inputs).logits, build("llama")(**inputs).logits)


@pytest.mark.parametrize(("ratio", "group_size"), [(0.25, 16), (0.11, 6), (0.01, 2), (1, 64)])
def test_group_size_is_a_fraction_of_the_window_rounded_down_to_even(ratio, group_size):
    assert configure_attention(build("llama"), group_size_ratio=ratio).group_size == group_size


def test_attention_dropout_acts_in_training_only():
    model = build("llama", attention_dropout=0.5)
    inputs, _ = inputs_of("plain")
    configure_attention(model, group_size=G)
    model.train()
    assert_differ(model(**inputs).logits, model(**inputs).logits)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_two_models_in_one_process_do_not_touch_each_other():
    inputs, _ = inputs_of("plain")
    first = sparse("llama")
    before = first(**inputs).logits
    second = build("llama")
    configure_attention(second, group_size=2, pattern="local")
    second.train()
    with use_attention(second, "dense"):
        assert torch.equal(first(**inputs).logits, before)
    assert torch.equal(first(**inputs).logits, before)


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
    # Layers with a window of their own stay with what they have.
    layers = {"gemma3_text": 1, "mistral": 0}.get(name, 2)
    assert kernel_calls == [LENGTH] * layers


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
    layers = 1 if name == "gemma3_text" else 2
    lengths = {"static": [], "none": [9 + step for step in range(8) for _ in range(layers)]}.get(cache, [9] * layers)
    assert kernel_calls == lengths


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


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["plain", "packed"])
def test_a_model_compiles_whole_and_once_for_all_lengths(row, monkeypatch):
    """With a kernel that takes cumulative lengths: one graph, compiled for the first length and once for all others."""
    from torch._dynamo.testing import CompileCounterWithBackend

    install(monkeypatch, PlainKernel(True, True))
    torch._dynamo.reset()
    model, compiled = sparse("llama", backend="plain"), sparse("llama", backend="plain")
    counter = CompileCounterWithBackend("eager")
    compiled.compile(backend=counter, fullgraph=True)
    for length in (LENGTH, 29, 40):
        inputs = dict(input_ids=torch.randint(3, 97, (1, length)), use_cache=False)
        if row == "packed":
            inputs["position_ids"] = torch.tensor([positions(4, 13, length - 17)])
        is_real = torch.ones(1, length, dtype=torch.bool)
        expected = logits_and_gradients(model, inputs, is_real)
        assert_same(logits_and_gradients(compiled, inputs, is_real), expected)
        with use_attention(model, "dense"):
            assert_differ(model(**inputs).logits, expected[0])
    assert counter.frame_count <= 2


# -- use_attention ------------------------------------------------------------------------------------------------


def test_use_attention_modes():
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


def test_use_attention_is_undone_after_errors_and_nests():
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


# -- gradient checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_gradient_checkpointing_gives_the_same_gradients(name, mode, reentrant):
    """Layers are computed again during backward, when the block is left and the model may be in evaluation mode."""
    inputs, segment_ids = inputs_of("packed")
    model = sparse(name)
    with use_attention(model, mode):
        expected = logits_and_gradients(model, inputs, segment_ids > 0)
    checkpoint_activations(model, reentrant)
    with use_attention(model, mode):
        logits = model(**inputs).logits[segment_ids > 0]
    model.zero_grad()
    for module in model.modules():
        module.training = False
    logits.sin().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same((logits, gradients), expected, tolerance=1e-6)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(group_size=5), r"group_size=5 .*even"),
        (dict(group_size=0), r"group_size=0 .*even"),
        (dict(group_size=-4), r"group_size=-4 .*even"),
        (dict(group_size=4.0), r"group_size=4\.0 .*even"),
        (dict(group_size_ratio=0), r"group_size_ratio=0 .*\(0, 1\]"),
        (dict(group_size_ratio=1.5), r"group_size_ratio=1\.5 .*\(0, 1\]"),
        (dict(pattern="s3"), r"pattern='s3' .*'s2', 'local', 'full'"),
        (dict(dense_layers=[0, 2]), r"dense_layers=\[0, 2\] .*\[2\].*0 to 1"),
        (dict(dense_layers=[-1]), r"dense_layers=\[-1\]"),
        (dict(dense_attention="sdpaa"), "sdpaa"),
    ],
)
def test_bad_values_are_refused_and_leave_the_model_as_it_was(kwargs, message):
    model = build("llama").train()
    inputs, _ = inputs_of("plain")
    before = model(**inputs).logits
    with pytest.raises(ValueError, match=message):
        configure_attention(model, **kwargs)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, before)


NO_ROTARY = dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
EXPERTS = dict(num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BloomConfig(**NO_ROTARY), r"bloom.*attention interface.*llama"),
        (GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4), r"gpt2.*rotary.*llama"),
        (Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8), r"softcap.*sdpa"),
        (GptOssConfig(**SIZES, **EXPERTS), r"sinks"),
    ],
    ids=["bloom", "gpt2", "gemma2", "gpt_oss"],
)
def test_architectures_that_cannot_are_refused(config, message):
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=message):
        configure_attention(model, group_size=4, backend="sdpa")
    assert model.config._attn_implementation == before


def test_a_model_whose_every_layer_has_a_window_is_told_so(caplog):
    configure_attention(build("mistral"), group_size=G)
    assert "Every layer of this model has a window of its own (sliding_window=5)" in caplog.text
    caplog.clear()
    configure_attention(build("gemma3_text"), group_size=G)
    assert not caplog.text


@pytest.mark.parametrize("mode", ["Sparse", "", None])
def test_use_attention_refuses_an_unknown_mode(mode):
    with pytest.raises(ValueError, match=r"mode=.*'auto', 'sparse' or 'dense'"), use_attention(sparse("llama"), mode):
        pass


def test_use_attention_refuses_a_model_without_s2_attn():
    with (
        pytest.raises(ValueError, match=r"does not use S2-Attn.*attn_implementation='s2_attn'"),
        use_attention(build("llama"), "sparse"),
    ):
        pass


def test_sinks_are_not_lost_where_nothing_was_configured():
    """An architecture that sdpa computes wrongly is dense through what transformers would take."""
    config = GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(2.0)
    ids = torch.arange(3, 43)[None]
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    model.set_attn_implementation("s2_attn")
    assert torch.equal(model(ids).logits, expected)


def test_sparse_is_refused_while_the_adapter_is_off(llama):
    model = get_peft_model(llama, LongLoraConfig(r=2, context_length=128))
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match=r"disabled.*Leave disable_adapter"),
        use_attention(model, "sparse"),
    ):
        pass


def test_a_plan_made_in_inference_mode_serves_training():
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    with torch.inference_mode():
        s2_attention(q, k, v, 6)
    q.requires_grad_()
    s2_attention(q, k, v, 6).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("through", ["configure_attention", "adapter"])
def test_documents_stay_apart_where_layers_never_see_the_positions(through):
    """persimmon does not pass position_ids on, and beside a 2-D mask transformers forgets what they say."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = PersimmonForCausalLM(PersimmonConfig(vocab_size=97, max_position_embeddings=64, **sizes))
    if through == "adapter":
        model = get_peft_model(model, LongLoraConfig(r=2, group_size=8))
    else:
        configure_attention(model, group_size=8)
    rows = model.get_input_embeddings()(torch.arange(3, 43)[None]).detach().requires_grad_()
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None]
    mask = torch.ones(1, 40, dtype=torch.long)
    out = model.train()(inputs_embeds=rows, position_ids=positions, attention_mask=mask, use_cache=True).logits
    out[:, 25:].sum().backward()
    assert not rows.grad[:, :25].any() and rows.grad[:, 25:].any()


def test_no_hook_is_left_behind(llama):
    before = len(llama._forward_pre_hooks)
    configure_attention(llama, group_size=8)
    configure_attention(llama, group_size=16)
    configured = len(llama._forward_pre_hooks)
    assert configured == before + 1
    get_peft_model(llama, LongLoraConfig(r=2, context_length=128)).unload()
    assert len(llama._forward_pre_hooks) == configured

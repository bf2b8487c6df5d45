"""Whole models with "s2_attn" in training: equal to the reference, compiled, checkpointed."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GptOssConfig,
    GptOssForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
)

from peft_longlora import LongLoraConfig, configure_attention, s2_attention, use_attention
from peft_longlora.reference import s2_attention_reference
from tests.helpers.attention_models import (
    CONFIGS,
    LENGTH,
    ROWS,
    G,
    assert_differ,
    assert_same,
    build,
    inputs_of,
    logits_and_gradients,
    positions,
    sparse,
)
from tests.helpers.plain_kernel import PlainKernel, install
from tests.helpers.releases import checkpoint_activations


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


def test_attention_dropout_acts_in_training_only():
    model = build("llama", attention_dropout=0.5)
    inputs, _ = inputs_of("plain")
    configure_attention(model, group_size=G)
    model.train()
    assert_differ(model(**inputs).logits, model(**inputs).logits)
    model.eval()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["plain", pytest.param("packed", marks=pytest.mark.slow)])
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


@torch.no_grad()
@pytest.mark.parametrize("what", ["blocks", pytest.param("model", marks=pytest.mark.slow)])
def test_a_compiled_evaluation_keeps_documents_apart(what):
    """Beside the cache that a model makes by default transformers would let them see each other."""
    model, lengths = sparse("llama").eval(), (4, 13, 6)
    inputs = dict(input_ids=torch.randint(3, 97, (1, LENGTH)), position_ids=torch.tensor([positions(*lengths)]))
    alone = torch.cat([model(input_ids=x).logits for x in inputs["input_ids"].split(lengths, 1)], 1)
    torch._dynamo.reset()
    for module in [model] if what == "model" else model.model.layers:
        module.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(**inputs).logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{}, pytest.param(dict(dense_every=2), marks=pytest.mark.slow)], ids=str)
def test_compiled_blocks_share_their_code(more, monkeypatch):
    """PyTorch compiles a function eight times, and runs it uncompiled from then on: most blocks of a model."""
    from torch._dynamo.testing import CompileCounterWithBackend

    install(monkeypatch, PlainKernel(True, True))
    torch._dynamo.reset()
    models, inputs = [build("llama", num_hidden_layers=6) for _ in range(2)], inputs_of("packed")[0]
    for model in models:
        configure_attention(model.train(), group_size=G, backend="plain", **more)
    counter = CompileCounterWithBackend("eager")
    for block in models[1].model.layers:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        is_real = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        assert_same(*(logits_and_gradients(model, inputs, is_real) for model in models))
    assert counter.frame_count == (4 if more else 2)  # the first block plans for the others


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


def test_compiled_blocks_are_recomputed_as_they_were(monkeypatch):
    """Compiled code does not know which layer it serves, so what was found for the mode of the forward holds."""
    from torch._dynamo.testing import CompileCounterWithBackend

    install(monkeypatch, PlainKernel(True, True))
    inputs, segment_ids = inputs_of("packed")
    model, other = sparse("llama", dense_every=2), inputs_of("plain")[0]
    for _ in range(2):  # the second is dense
        expected = logits_and_gradients(model, inputs, segment_ids > 0)
    compiled = sparse("llama", dense_every=2, backend="plain")
    checkpoint_activations(compiled, False)
    monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for block in compiled.model.layers:
        block.compile(backend=counter)
    compiled(**inputs)
    logits = compiled(**inputs).logits[segment_ids > 0]
    compiled(**other)  # sparse, and later than what is recomputed
    for module in compiled.modules():
        module.training = False
    logits.sin().sum().backward()
    assert_same((logits, {n: p.grad for n, p in compiled.named_parameters() if p.grad is not None}), expected)
    assert counter.frame_count, "nothing was compiled"


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

"""Layers with a sliding window, chunks or sinks: in training they run on the kernels, and keep what they are."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import chunked_causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from peft_longlora import configure_attention, use_attention
from peft_longlora.attention.local import Local, find_local
from peft_longlora.attention.mask import S2Mask
from peft_longlora.reference import s2_attention_reference
from tests.helpers.every_config import tiny_model

WINDOW, G, LENGTHS = 5, 8, (7, 19, 1, 13)
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0)
SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_local_experts=2, num_experts_per_tok=1)
DEFAULT = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
TYPES = {
    "gpt_oss": {**SLIDING, **EXPERTS, **DEFAULT},
    "gemma3_text": SLIDING,
    "llama4_text": dict(
        **EXPERTS, **DEFAULT, attention_chunk_size=WINDOW, layer_types=["chunked_attention", "full_attention"],
        intermediate_size_mlp=32, no_rope_layers=[1, 1], moe_layers=[],
    ),
    "gemma4_text": dict(  # heads of two sizes; the last two layers reuse keys and values of the first two
        sliding_window=WINDOW, layer_types=SLIDING["layer_types"] * 2, num_hidden_layers=4, num_kv_shared_layers=2,
        global_head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97,
    ),
}  # fmt: skip
TYPES = {name: more for name, more in TYPES.items() if name in CONFIG_MAPPING}
ROW = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
PACKED = dict(input_ids=ROW, position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None])
DOCUMENTS = torch.tensor([i for i, n in enumerate(LENGTHS, 1) for _ in range(n)])[None]


def truth(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """The definition, told which documents there are and what each layer is."""
    kind = module.config.layer_types[module.layer_idx]
    more = dict(segment_ids=truth.segment_ids, scaling=scaling, sinks=kwargs.get("s_aux"))
    if kind == "full_attention":
        return s2_attention_reference(query, key, value, G, **more), None
    if kind == "chunked_attention":
        return s2_attention_reference(query, key, value, WINDOW, pattern="local", **more), None
    return s2_attention_reference(query, key, value, 2, pattern="full", window=WINDOW, **more), None


AttentionInterface.register("truth_of_local", truth)
AttentionMaskInterface.register("truth_of_local", sdpa_mask)


def make(name, attention=None):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **TYPES[name]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    if attention is None:
        configure_attention(model, group_size=G, backend="sdpa")
    return model.train()


def gradients(model, call, is_real):
    logits = model(**call, use_cache=False).logits[is_real]
    logits.sin().sum().backward()
    return [logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}]


@pytest.mark.parametrize("rows", ["packed", "padded", "packed and padded"])
@pytest.mark.parametrize("name", TYPES)
def test_a_step_is_that_of_the_definition(name, rows, monkeypatch):
    call, documents = dict(PACKED), DOCUMENTS
    if rows == "padded":
        documents = torch.ones(2, 20, dtype=torch.long)
        documents[0, :6], documents[1, 15:] = 0, 0
        call = dict(input_ids=ROW[:, :40].view(2, 20), attention_mask=documents)
    elif rows == "packed and padded":
        documents = torch.cat([torch.zeros(1, 3, dtype=torch.long), DOCUMENTS], dim=1)
        call = {name: torch.nn.functional.pad(x, (3, 0)) for name, x in PACKED.items()}
        call["attention_mask"] = (documents > 0).long()
    model = make(name)
    monkeypatch.setattr(S2Mask, "dense", lambda *_: pytest.fail("dense attention with a mask"))
    found = gradients(model, call, documents > 0)
    truth.segment_ids = documents
    wanted = gradients(make(name, "truth_of_local"), call, documents > 0)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=2e-4)
    assert found[1].keys() == wanted[1].keys()
    for one, grad in wanted[1].items():
        torch.testing.assert_close(found[1][one], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-6)
    if name == "gpt_oss":
        assert all(wanted[1][f"model.layers.{i}.self_attn.sinks"].abs().min() > 1e-4 for i in (0, 1))


@torch.no_grad()
@pytest.mark.parametrize("name", TYPES)
def test_evaluation_is_that_of_stock(name):
    """And on the fastest kernel the same within rounding."""
    model, stock = make(name).eval(), make(name, "eager" if name == "gpt_oss" else "sdpa").eval()
    call = dict(input_ids=ROW, use_cache=False)
    wanted = stock(**call).logits
    assert torch.equal(model(**call).logits, wanted)
    with use_attention(model, "dense", dense_attention="fastest"):
        torch.testing.assert_close(model(**call).logits, wanted, rtol=1e-4, atol=1e-4)


def rule(function, size=WINDOW, has_chunks=False, **more):
    how = dict(batch_size=1, q_length=12, kv_length=12, device=torch.device("cpu"), local_size=size)
    return find_local(S2Mask({**how, "mask_function": function, **more}), None, has_chunks)


def test_what_a_rule_is():
    padding = torch.zeros(1, dtype=torch.long)
    assert rule(sliding_window_causal_mask_function(WINDOW)) == Local("window", WINDOW)
    assert rule(chunked_causal_mask_function(WINDOW, padding)) == Local("chunks", WINDOW)
    assert rule(chunked_causal_mask_function(4, padding)) is None  # not what its name says
    assert rule(sliding_window_causal_mask_function(WINDOW + 1)) is None
    assert rule(sliding_window_causal_mask_function(WINDOW - 1)) is None
    assert rule(lambda b, h, q, k: (q - k).abs() < WINDOW) is None  # it sees later tokens
    for name, function in (("window", sliding_window_causal_mask_function), ("chunks", chunked_causal_mask_function)):
        more = (padding,) if name == "chunks" else ()
        assert rule(function(WINDOW, *more), has_chunks=name != "chunks").kind == name  # what it is, whatever is said
        assert rule(function(12, *more), 12, has_chunks=name == "chunks") == Local(name, 12)  # both fit 12 tokens
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
    assert rule(sliding_window_causal_mask_function(WINDOW), attention_mask=mask) is None  # inside a document
    left = torch.tensor([[0, 0] + [1] * 10])
    assert rule(chunked_causal_mask_function(WINDOW, padding + 2), attention_mask=left) == Local("chunks", WINDOW)
    assert rule(chunked_causal_mask_function(WINDOW, padding + 1), attention_mask=left) is None


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_evaluation_with_the_cache_that_a_model_makes_counts_chunks_from_each_document(compiled):
    model = tiny_model("llama4_text").eval()
    configure_attention(model, group_size=8)
    lengths = (13, 1, 11)
    ids = torch.randint(3, 40, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([model(input_ids=x, use_cache=False).logits for x in ids.split(lengths, 1)], dim=1)
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="eager")
    for how in ({}, {"use_cache": False}):
        torch.testing.assert_close(
            model(input_ids=ids, position_ids=positions, **how).logits, alone, rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_a_compiled_step_counts_chunks_from_each_document():
    compiled = make("llama4_text")
    torch._dynamo.reset()
    for block in compiled.model.layers:
        block.compile(backend="eager")
    truth.segment_ids = DOCUMENTS
    (logits, grads), (wanted, right) = (
        gradients(model, PACKED, DOCUMENTS > 0) for model in (compiled, make("llama4_text", "truth_of_local"))
    )
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=2e-4)
    for name, grad in right.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-6)

"""Layers with a state along the sequence: documents of packed and padded rows are computed as if each were alone."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

from peft_longlora import LongLoraConfig, configure_attention, use_attention
from peft_longlora.architecture import find_state_layers
from peft_longlora.attention.mask import S2Mask
from peft_longlora.attention.states import Apart
from tests.helpers.every_config import tiny_model

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16)
TYPES = {
    "qwen3_5_text": {**DELTA, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "minimax": dict(
        layer_types=["linear_attention", "full_attention"], block_size=8, num_local_experts=2, num_experts_per_tok=1
    ),
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
}
LENGTHS = (7, 30, 1, 12, 20)  # tokens of documents: batches of (30, 20), (12, 7) and (1)
ROW = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def make(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **TYPES[name]})).float()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def configured(name):
    model = make(name).train()
    configure_attention(model, group_size=8, backend="sdpa")
    return model


def gradients(model, calls, real=None):
    """Logits of tokens, and the gradients of a loss on them; some calls one after the other."""
    model.zero_grad()
    outs = []
    for call in calls:
        logits = model(**call, use_cache=False).logits
        keep = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
        logits[keep].sin().sum().backward()
        outs.append(logits[keep].detach())
    return torch.cat(outs), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_a_packed_row_is_its_documents_alone(name):
    model = configured(name)
    alone = gradients(model, [dict(input_ids=part) for part in ROW.split(LENGTHS, dim=1)])
    assert_same(gradients(model, [dict(input_ids=ROW, position_ids=POSITIONS)]), alone)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([dict(input_ids=part[0].tolist()) for part in ROW.split(LENGTHS, dim=1)])
    batch.pop("labels")
    assert_same(gradients(model, [batch]), alone)
    whole = gradients(model, [dict(input_ids=ROW)])  # and the next call knows nothing of it
    assert (whole[0] - alone[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TYPES)
def test_padded_rows_are_their_documents_alone(name):
    """A row with padding on its left and two documents, and one with padding on its right."""
    model = configured(name)
    tokens = ROW[:, :40].view(2, 20)
    mask, positions = torch.ones_like(tokens), torch.arange(20).expand(2, -1).clone()
    mask[0, :8], mask[1, 13:] = 0, 0
    positions[0] = torch.tensor([0] * 8 + [*range(5), *range(7)])
    alone = [dict(input_ids=x) for x in (tokens[:1, 8:13], tokens[:1, 13:], tokens[1:, :13])]
    found = gradients(model, [dict(input_ids=tokens, attention_mask=mask, position_ids=positions)])
    assert_same(found, gradients(model, alone))


def test_padding_inside_a_document_is_left_out():
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0]])
    made = S2Mask(dict(batch_size=2, q_length=5, kv_length=5, device=torch.device("cpu"), attention_mask=mask))
    apart = Apart.of(made, None)
    assert [x.tolist() for x in apart.tokens] == [[[0, 1, 3], [6, 7, 8]]]
    x = torch.arange(1, 11).view(2, 5)
    assert apart.restore([apart.arrange(x, apart.tokens[0])]).tolist() == (x * mask).tolist()


def test_batches_hold_documents_of_similar_length():
    """At most half of a batch is empty; and one batch where a layer must run as often on every rank."""
    made = S2Mask(dict(batch_size=1, q_length=70, kv_length=70, device=torch.device("cpu")))
    assert [tuple(x.shape) for x in Apart.of(made, POSITIONS).tokens] == [(2, 30), (2, 12), (1, 1)]
    assert [tuple(x.shape) for x in Apart.of(made, POSITIONS, is_at_once=True).tokens] == [(5, 30)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_keeps_documents_apart(reentrant):
    model = configured("qwen3_5_text")
    call = dict(input_ids=ROW, position_ids=POSITIONS)
    wanted = gradients(model, [call])
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    model.enable_input_require_grads()
    assert_same(gradients(model, [call]), wanted)
    # Other forwards may come in between, as that of a reference model; and several forwards before one backward.
    model.zero_grad()
    logits = model(**call, use_cache=False).logits
    model(input_ids=ROW[:, :9], use_cache=False)
    with torch.no_grad():
        model(input_ids=ROW, use_cache=False)
    whole = model(input_ids=ROW, use_cache=False).logits
    (logits.sin().sum() + whole.sin().sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    of_whole = gradients(model, [dict(input_ids=ROW)])
    both = {name: wanted[1][name] + grad for name, grad in of_whole[1].items()}
    assert_same((logits[0].detach(), found), (wanted[0], both))


@torch.no_grad()
def test_in_every_mode_and_not_without_the_adapter():
    base = make("qwen3_5_text").eval()
    packed = dict(input_ids=ROW, position_ids=POSITIONS, use_cache=False)
    stock = base(**packed).logits
    model = get_peft_model(base, LongLoraConfig(context_length=128, group_size=8, rope_type="linear"))
    parts = ROW.split(LENGTHS, dim=1)
    for training, mode in ((False, "auto"), (True, "dense"), (True, "auto")):
        model.train(training)
        with use_attention(model, mode):
            found = model(**packed).logits
            alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in parts], dim=1)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    # A cache that the model makes itself is not read in training.
    torch.testing.assert_close(model(**packed | dict(use_cache=True)).logits, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(copy.deepcopy(model)(**packed).logits, model(**packed).logits)
    with model.eval().disable_adapter():
        assert torch.equal(model(**packed).logits, stock)
    base = model.unload()
    assert torch.equal(base(**packed).logits, stock)
    assert not any(layer._forward_pre_hooks for layer in find_state_layers(base).values())


@torch.no_grad()
def test_generation_goes_on_from_states():
    """Two prompts, one of them padded before it, with a cache and without."""
    model = configured("lfm2").eval()
    tokens = ROW[:, :24].view(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached = model.generate(tokens, attention_mask=mask, use_cache=True, **how)
    assert torch.equal(cached, model.generate(tokens, attention_mask=mask, use_cache=False, **how))


@torch.no_grad()
def test_a_model_that_was_only_loaded_is_refused_on_packed_rows():
    config = AutoConfig.for_model("lfm2", **SIZES, **TYPES["lfm2"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="s2_attn").train()
    model(input_ids=ROW, use_cache=False)
    with pytest.raises(NotImplementedError, match=r"layers of the kind conv.*configure_attention\(model\)"):
        model(input_ids=ROW, position_ids=POSITIONS, use_cache=False)


def test_which_layers_hold_a_state():
    kinds = {name: {type(x).__name__ for x in find_state_layers(make(name)).values()} for name in TYPES}
    assert kinds == {
        "qwen3_5_text": {"Qwen3_5GatedDeltaNet"},
        "lfm2": {"Lfm2ShortConv"},
        "falcon_h1": {"FalconH1Mixer"},
        "minimax": {"MiniMaxLightningAttention"},
        "bamba": {"BambaMixer"},
    }
    if "nemotron_h" in CONFIG_MAPPING:  # whose blocks are all of one class, which takes a cache
        assert {type(x).__name__ for x in find_state_layers(tiny_model("nemotron_h")).values()} == {
            "NemotronHMamba2Mixer"
        }
    config = AutoConfig.for_model("llama", **SIZES)
    assert not find_state_layers(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def test_a_layer_whose_output_is_no_vector_a_token_is_refused():
    class Odd(torch.nn.Module):
        def forward(self, hidden_states, cache=None, **kwargs):
            return hidden_states.transpose(1, 2)

    configure_attention(make("lfm2"), group_size=8, backend="sdpa")  # a kind is tried once, and this one would fail
    model = make("lfm2").train()
    model.model.layers[0].conv = Odd()
    configure_attention(model, group_size=8, backend="sdpa")
    with pytest.raises(NotImplementedError, match="Give each document a row of its own"):
        model(input_ids=ROW, position_ids=POSITIONS, use_cache=False)

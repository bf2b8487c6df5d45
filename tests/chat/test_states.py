"""Hybrid models, some of whose layers hold a state in place of keys and values: their answers are those of generate."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from peft_longlora.chat import Conversation, KVCache
from peft_longlora.hub.generation import decoding
from tests.helpers.chat_models import a_document, a_model, a_reader

MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16)
DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
MODELS = {
    "qwen3_5_text": dict(head_dim=16, layer_types=["linear_attention", "full_attention"], **DELTA),
    "olmo_hybrid": dict(layer_types=["linear_attention", "full_attention"], **DELTA),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "falcon_h1": dict(mamba_d_ssm=32, **{**MAMBA, "mamba_d_head": 8}),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=48, **MAMBA
    ),
    "lfm3": dict(layer_types=["conv", "full_attention"], head_dim=16),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, num_experts=2),
    "zamba2": dict(mamba_d_state=8, n_mamba_heads=2, layers_block_type=["mamba", "hybrid"], chunk_size=16),
}
MODELS = {name: sizes for name, sizes in MODELS.items() if name in CONFIG_MAPPING}


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_generate_without_our_cache(tmp_path, name):
    model = a_model(name, adapter=False, max_position_embeddings=4096, **MODELS[name])
    conversation = Conversation(a_reader(model=model, chat=True), a_document(tmp_path), max_new_tokens=12)
    assert conversation.kv.has_states
    lengths = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    conversation.read()
    for question in ("Where is the key?", "Why?", "forget", "Why?"):
        if question == "forget":
            conversation.forget()
            continue
        lengths.clear()
        list(conversation.ask(question))
        assert max(lengths) == 1  # the document is read once; what follows it comes token by token
        inputs = torch.tensor([conversation._prompt])
        want = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=decoding(12))
        assert conversation._row == want[0].tolist()
    row, start = conversation._row, len(conversation._prompt)
    assert conversation.passages(2, by="attention")
    assert conversation.kv.ids == row[:-1]
    with torch.no_grad():
        cached = model(torch.tensor([row[-1:]]), **conversation.kv.as_argument, use_cache=True).logits
        whole = model(torch.tensor([row]), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(cached, whole, rtol=1e-3, atol=1e-3)
    assert start < len(row)


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_a_cache_that_cannot_go_back_reads_again_and_says_so(tmp_path, name):
    model = a_model(name, adapter=False, max_position_embeddings=4096, **MODELS.get(name, {}))
    conversation = Conversation(a_reader(model=model, chat=True), a_document(tmp_path), max_new_tokens=4)
    kv, ids, again = conversation.kv, list(range(3, 43)), name == "lfm2"
    for kept, row, reread in ((0, ids[:25] + [5] * 3, 25), (20, ids[:25] + [6] * 3, 5), (0, ids, 0)):
        kv.clear()
        if kept:
            kv.fill(ids[:kept])
            kv.keep()
        kv.fill(ids[:30])
        assert kv.reread == 0
        kv.fill(row)
        assert kv.ids == row and kv.reread == again * reread * (row != ids)
        assert (f"{reread} of them read again: this cache cannot go back" in conversation.usage) == bool(kv.reread)
        with torch.no_grad():
            cached = model(torch.tensor([[7]]), **kv.as_argument, use_cache=True).logits
            whole = model(torch.tensor([[*row, 7]]), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(cached, whole, rtol=1e-3, atol=1e-3)


def test_a_model_with_a_cache_of_its_own_reads_each_row_at_once(tmp_path):
    """MiniMax takes no cache but its own, which it makes itself and which goes back nowhere."""
    more = dict(layer_types=["full_attention", "linear_attention"], block_size=1024, num_local_experts=2)
    model = a_model("minimax", adapter=False, max_position_embeddings=4096, **more)
    conversation = Conversation(a_reader(model=model, chat=True), a_document(tmp_path), max_new_tokens=6)
    for question in ("Where is the key?", "Why?"):
        list(conversation.ask(question))
        inputs = torch.tensor([conversation._prompt])
        want = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=decoding(6))
        assert conversation._row == want[0].tolist()
        assert "of them read again: this cache cannot go back" in conversation.usage
    with pytest.raises(ValueError, match="cache='quantised' holds keys and values"):
        KVCache(model, "quantised", backend="hqq")


def test_other_kinds_of_cache_are_refused():
    model = a_model("lfm2", adapter=False, **MODELS["lfm2"])
    with pytest.raises(ValueError, match=r"cache='quantised' holds keys and values, and some layers of .*lfm2"):
        KVCache(model, "quantised", backend="hqq")
    assert not KVCache(a_model(adapter=False)).has_states

"""Whole models with the patterns that see blocks of keys: in training as the reference, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from peft_longlora import LongLoraConfig, configure_attention, use_attention
from peft_longlora.kernels.patterns import BLOCK_PATTERNS
from peft_longlora.reference import s2_attention_reference
from peft_longlora.sequence import parallelize_sequence
from tests.helpers.tiny import extend, make

G, LENGTH = 256, 700
TOKENS = torch.randint(3, 97, (1, LENGTH), generator=torch.Generator().manual_seed(1))
PACKED = torch.cat([torch.arange(640), torch.arange(60)])[None]
PADDED = torch.ones_like(TOKENS)
PADDED[:, :60] = PADDED[:, 500:503] = 0
ROWS = {
    "plain": ({}, torch.ones_like(TOKENS)),
    "packed": (dict(position_ids=PACKED), (PACKED == 0).cumsum(1)),
    "padded left": (dict(attention_mask=(torch.arange(LENGTH) >= 60).long()[None]), (torch.arange(LENGTH) >= 60)[None]),
}


@pytest.fixture
def reference(request):
    settings = {}

    def forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        return s2_attention_reference(query, key, value, G, scaling=scaling, **settings), None

    AttentionInterface.register("s2_test_blocks", forward)
    AttentionMaskInterface.register("s2_test_blocks", lambda **kwargs: None)
    yield settings
    del AttentionInterface._global_mapping["s2_test_blocks"]
    del AttentionMaskInterface._global_mapping["s2_test_blocks"]


CHOSEN = {"adaptive": dict(chosen_blocks=1)}


def logits_and_gradients(model, real, **inputs):
    logits = model(input_ids=TOKENS, use_cache=False, **inputs).logits[real]
    model.zero_grad()
    logits.sin().sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("pattern", BLOCK_PATTERNS)
def test_training_equals_the_reference(pattern, row, reference):
    inputs, ids = ROWS[row]
    reference.update(segment_ids=ids.long(), pattern=pattern, chosen_blocks=1)
    plain, model = make(max_position_embeddings=1024).train(), make(max_position_embeddings=1024).train()
    plain.set_attn_implementation("s2_test_blocks")
    configure_attention(model, group_size=G, pattern=pattern, **CHOSEN.get(pattern, {}))
    expected, found = (logits_and_gradients(one, ids > 0, **inputs) for one in (plain, model))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-3 * scale)
    with use_attention(model, "dense"):
        assert (model(input_ids=TOKENS, use_cache=False, **inputs).logits[ids > 0] - found[0]).abs().max() > 1e-2


@pytest.mark.parametrize("pattern", BLOCK_PATTERNS)
def test_padding_inside_a_document_is_left_out(pattern):
    """The positions go on over it, so tokens behind it are as if the padding held anything."""
    model = make(max_position_embeddings=1024).train()
    configure_attention(model, group_size=G, pattern=pattern, **CHOSEN.get(pattern, {}))
    first = model(input_ids=TOKENS, attention_mask=PADDED, use_cache=False).logits[PADDED > 0]
    other = TOKENS.masked_fill(PADDED == 0, 5)
    torch.testing.assert_close(model(input_ids=other, attention_mask=PADDED, use_cache=False).logits[PADDED > 0], first)
    cut = model(input_ids=TOKENS, position_ids=torch.cat([torch.arange(500), torch.arange(200)])[None]).logits
    assert (cut[PADDED > 0] - first).abs().max() > 1e-2


def test_an_adapter_keeps_its_pattern(tmp_path):
    from peft import PeftModel

    settings = dict(context_length=1024, group_size=G, attention_pattern="adaptive", chosen_blocks=2)
    model = extend(make(), init_lora_weights=False, **settings).train()
    logits = model(input_ids=TOKENS, use_cache=False).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).train()
    assert torch.equal(again(input_ids=TOKENS, use_cache=False).logits, logits)
    other = LongLoraConfig(**{**settings, "chosen_blocks": 1})
    with pytest.raises(ValueError, match="want different attention"):
        model.add_adapter("other", other)
    assert "blocks of 128 keys" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_compiled_model_breaks_its_graph_and_is_right():
    model, compiled = (make(max_position_embeddings=1024).train() for _ in range(2))
    for one in (model, compiled):
        configure_attention(one, group_size=G, pattern="window")
    torch._dynamo.reset()
    compiled.compile(backend="eager")
    torch.testing.assert_close(compiled(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", BLOCK_PATTERNS)
def test_ranks_do_not_share_it(pattern):
    model = make()
    configure_attention(model, group_size=G, pattern=pattern)
    with pytest.raises(NotImplementedError, match="cannot be used where ranks share a sequence"):
        parallelize_sequence(model, SimpleNamespace(ndim=1, mesh_dim_names=("sequence",)))

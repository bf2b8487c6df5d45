"""How a model writes: its own defaults change nothing, and the bytes of a cache are those of its shape."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from peft_longlora.hub.generation import cache_bytes, decoding

PROMPT = torch.tensor([[5, 6, 7, 8]])


def write(model, config) -> list[int]:
    torch.manual_seed(0)
    row = model.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), generation_config=config)
    return row[0, 4:].tolist()


def test_greedy_is_the_likeliest_token_whatever_the_model_brings(llama):
    want = PROMPT
    for _ in range(6):
        want = torch.cat([want, llama(input_ids=want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    llama.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, top_p=0.5, num_beams=2, repetition_penalty=2.0,
        no_repeat_ngram_size=1, min_new_tokens=6, max_new_tokens=9,
    )  # fmt: skip
    assert write(llama, decoding(6)) == want[0, 4:].tolist()


def test_a_temperature_draws_from_all_tokens(llama):
    """Two seeds differ at a high temperature, and a share of next to nothing is greedy again."""
    hot = [write(llama, decoding(8, temperature=100.0)) for _ in range(2)]
    assert hot[0] == hot[1], "one seed, one answer"
    assert hot[0] != write(llama, decoding(8))
    assert write(llama, decoding(8, temperature=1.0, top_p=1e-6)) == write(llama, decoding(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_cache(llama, dtype):
    cache = DynamicCache()
    llama.to(dtype)(input_ids=PROMPT, past_key_values=cache, use_cache=True)
    config = llama.config
    a_head = config.head_dim or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * a_head * PROMPT.shape[1]
    assert cache_bytes(cache) == numbers * dtype.itemsize

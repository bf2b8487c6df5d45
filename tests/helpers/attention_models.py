"""Whole models with "s2_attn", the rows they are given, and what is compared. Shared by tests/attention."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    MistralConfig,
    Qwen3Config,
)

from peft_longlora import configure_attention
from tests.helpers.configs import tiny_llama_config

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


def build(name: str, attention: str = "sdpa", **kwargs):
    """The same weights whatever the attention."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    for field, value in kwargs.items():
        setattr(config, field, value)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def sparse(name: str, **kwargs):
    model = build(name)
    configure_attention(model, group_size=None if kwargs.get("pattern") == "full" else G, **kwargs)
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

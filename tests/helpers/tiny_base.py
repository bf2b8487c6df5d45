"""A tiny base in a folder, with a real tokenizer, and text to train it on; for tests that run what a user runs."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.helpers.paths import EMBEDDED

WORDS = ("def", "return", "import", "self", "class", "None", "for", "in", "if", "else", "while", "with", "raise")
WORDS += ("yield",)


def save_base(folder: Path) -> Path:
    """A random model with a window of 64 tokens and the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # wide enough for a random model to prefer some tokens clearly
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prose(words: int, seed: int) -> str:
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in picks)

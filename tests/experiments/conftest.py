"""A folder with what a tiny study needs: a base whose tokens are characters, books, and the study."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.helpers.configs import tiny_llama_config

STUDY = """
title: a tiny study
window: 96
seeds: [0]
budgets: [tokens, time]
reference: full
config: {r: 4, lora_alpha: 8, context_length: 96, rope_type: yarn}
training: {steps: 6, learning_rate: 2.0e-2, embedding_learning_rate: 5.0e-3, warmup_steps: 2}
evaluation: {native_window: 32, edges: [0, 32, 96], passkey_lengths: [224], passkeys: 2}
cells:
  - {name: full, budgets: [tokens], config: {attention_pattern: full}}
  - {name: unknown, budgets: [tokens], config: {no_such_field: 1}}
  - {name: last, config: {attention_pattern: local, group_size: 16}, training: {dense_steps: {last: 2}}}
  - {name: untrained, budgets: [tokens], config: {attention_pattern: full}, training: {steps: 0}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base model whose tokens are characters, books as tokens, and a study."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config(max_position_embeddings=64)).save_pretrained(folder / "base")
    words = {chr(code): number for number, code in enumerate([*range(32, 127), 10])}  # 96 of 97
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(folder / "base")
    rng = np.random.default_rng(0)
    for split, lengths in (("train", (90, 300, 500)), ("validation", (250, 400))):
        np.save(folder / f"{split}.npy", rng.integers(3, 90, sum(lengths)).astype(np.uint16))
        np.save(folder / f"{split}_off.npy", np.cumsum([0, *lengths]))
    (folder / "tiny.yaml").write_text(STUDY)
    return folder

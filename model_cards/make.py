"""Render the cards of this folder: `python model_cards/make.py` (no network, no weights, some seconds).

Each entry describes the base as its published config.json does (window, RoPE, vocabulary), and gives a `LongLoraConfig`
for it. The script makes a model of that architecture, a few channels wide, and the package's own code adds the adapter
to it. So a card says what it would say after training with that config.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_longlora import LongLoraConfig
from peft_longlora.hub.card import CardOptions, make_card
from peft_longlora.hub.readme import BEGIN, END

FOLDER = Path(__file__).parent
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
HEAD = """> A template: there are no weights behind this card, and nothing was measured. It shows the card that an
> adapter of this base gets. The config that makes such an adapter is at the end."""
TAIL = """## The config that makes such an adapter

```python
{code}
```"""


@dataclass(frozen=True)
class Card:
    """A base as its config.json states it, and the adapter for it."""

    base: str
    model_type: str
    license: str
    config: dict[str, Any]
    adapter: dict[str, Any]


CARDS = {
    # The paper's own setting (arXiv:2309.12307, section 4.1): Position Interpolation, LoRA of rank 8, groups of 1/4.
    "Llama-2-7b-longlora-32k": Card(
        base="meta-llama/Llama-2-7b-hf",
        model_type="llama",
        license="llama2",
        config={
            "max_position_embeddings": 4096,
            "vocab_size": 32000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        adapter={"r": 8, "lora_alpha": 16, "context_length": 32768, "rope_type": "linear"},
    ),
    # The base's RoPE is scaled by 8 from 8192 already, and scalings do not add up: the whole new one is given.
    "Llama-3.1-8B-longlora-256k": Card(
        base="meta-llama/Llama-3.1-8B",
        model_type="llama",
        license="llama3.1",
        config={
            "max_position_embeddings": 131072,
            "vocab_size": 128256,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        adapter={
            "r": 16,
            "lora_alpha": 32,
            "context_length": 262144,
            "group_size": 16384,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    # Trained at 32768; its config states 40960. The YaRN factor is the one that its authors give for 131072.
    "Qwen3-8B-longlora-128k": Card(
        base="Qwen/Qwen3-8B",
        model_type="qwen3",
        license="apache-2.0",
        config={
            "max_position_embeddings": 40960,
            "vocab_size": 151936,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        adapter={
            "r": 16,
            "lora_alpha": 32,
            "context_length": 131072,
            "group_size": 16384,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        },
    ),
    # v0.3 has no sliding window; in v0.1 every layer has one, and such layers stay as they are.
    "Mistral-7B-v0.3-longlora-128k": Card(
        base="mistralai/Mistral-7B-v0.3",
        model_type="mistral",
        license="apache-2.0",
        config={
            "max_position_embeddings": 32768,
            "vocab_size": 32768,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        adapter={"r": 16, "lora_alpha": 32, "context_length": 131072, "group_size": 16384},
    ),
}


def narrow_model(card: Card) -> torch.nn.Module:
    """A model of the base's architecture, window, RoPE and vocabulary, few channels wide."""
    config = AutoConfig.for_model(card.model_type, **card.config, **NARROW)
    return AutoModelForCausalLM.from_config(config, attn_implementation="s2_attn")


def render(name: str) -> str:
    """The text of one card."""
    card = CARDS[name]
    config = get_peft_model(narrow_model(card), LongLoraConfig(**card.adapter)).peft_config["default"]
    config.base_model_name_or_path = card.base
    config.card = CardOptions(license=card.license)
    arguments = json.dumps(card.adapter, indent=4)[1:-1].rstrip() + ","  # numbers and text alone: also Python
    arguments = re.sub(r'^    "(\w+)": ', r"    \1=", arguments, flags=re.MULTILINE)
    arguments = re.sub(r"(?<=[\w\"])\n    }", ",\n    }", arguments)
    tail = TAIL.format(code=f"LongLoraConfig({arguments}\n)")
    # What stands outside of the marks in an older card is kept.
    return str(make_card(config, f"your-name/{name}", old=f"---\n{{}}\n---\n\n{HEAD}\n\n{BEGIN}\n{END}\n\n{tail}\n"))


if __name__ == "__main__":
    for name in CARDS:
        path = FOLDER / f"{name}.md"
        path.write_text(render(name), encoding="utf-8")
        print(path)

"""What the tests of other people's runtimes share: an adapter that matters, and the tokens it gives in transformers."""

from __future__ import annotations

import argparse
import inspect

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from peft_longlora import LongLoraConfig
from tests.helpers import paths

EMBEDDED = str(paths.EMBEDDED)
BASE_WINDOW, WINDOW = 512, 2048
PROMPT, ANSWER = 1500, 64  # tokens: most of the prompt lies beyond the base's window


def prompt(tokens: int = PROMPT) -> list[int]:
    """Python code, which the embedded model was trained on."""
    return AutoTokenizer.from_pretrained(EMBEDDED)(inspect.getsource(argparse))["input_ids"][:tokens]


def adapt(base: PreTrainedModel, noise: float, **fields) -> PeftModel:
    """An extended window, and random changes of all that an adapter trains."""
    config = LongLoraConfig(**{"r": 8, "lora_alpha": 16, "context_length": WINDOW, **fields})
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(noise: float = 0.002, **fields) -> PeftModel:
    """The embedded model with an adapter."""
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, attn_implementation="s2_attn")
    return adapt(base, noise, **fields)


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int]) -> list[int]:
    """The most probable next tokens after `ids`, by transformers."""
    inputs = torch.tensor([ids])
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=ANSWER,
        do_sample=False,
        eos_token_id=None,
    )
    return output[0, len(ids) :].tolist()

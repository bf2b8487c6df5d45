"""What evaluations are run on: a small model with a real tokenizer, an adapter of it, and a folder of texts."""

import argparse
import inspect
import json.decoder
import textwrap
from pathlib import Path

import torch
from transformers import AutoTokenizer

from peft_longlora.eval.subject import load_subject
from tests.helpers.paths import EMBEDDED
from tests.helpers.tiny import extend, make


def save_base(folder: Path) -> str:
    make(vocab_size=4096).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, base: str) -> str:
    model = extend(load_subject(base).model, context_length=256)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    return str(folder)


def save_texts(folder: Path) -> str:
    """Three documents of Python code, which the tokenizer was made for."""
    folder.mkdir()
    for module in (argparse, json.decoder, textwrap):
        (folder / f"{module.__name__}.txt").write_text(inspect.getsource(module)[:1500])
    return str(folder)

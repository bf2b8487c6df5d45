"""What evaluations are run on: a small model with a real tokenizer, an adapter of it, texts, and models of letters."""

import argparse
import inspect
import json.decoder
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoTokenizer

from peft_longlora.cli import main as cli
from peft_longlora.eval import Corpus, Perplexity
from peft_longlora.eval.subject import Subject, load_subject
from tests.helpers.answering_models import Bigrams, letter_tokenizer
from tests.helpers.paths import EMBEDDED
from tests.helpers.tiny import extend, make

P = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.05, 0.05, 0.45, 0.45]])


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


def letters(folder: Path) -> Corpus:
    """Five documents of letters, 33 to 77 of them."""
    folder = folder / "letters"
    folder.mkdir(exist_ok=True)
    for i in range(5):
        (folder / f"{i}.txt").write_text("abdcadbbcda" * (i + 3))
    return Corpus(folder)


def letter_tasks(folder: Path) -> list[Perplexity]:
    """Both protocols on them."""
    return [Perplexity(letters(folder), [8, 32]), Perplexity(letters(folder), [8], "longlora", stride=4)]


def letter_subject(model=None) -> Subject:
    """A model of letters whose every probability is in P."""
    return Subject.of(model or Bigrams(P), letter_tokenizer())


class Small(Bigrams):
    """A model whose device has no room for windows of more than 16 tokens."""

    has_room = False

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        if input_ids.shape[1] > 16 and not self.has_room:
            torch.empty(2**56)  # the allocator's own error
        return super().forward(input_ids, use_cache)


def longlora(*arguments) -> int:
    """The command line in this process; gives the exit code."""
    return cli.main([str(argument) for argument in arguments])

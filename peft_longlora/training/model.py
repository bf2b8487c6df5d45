"""Tokenizer, base and adapter of a recipe. `sketch` makes them without weights, so that refusals come at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.attention.configure import configure_attention
from peft_longlora.attention.settings import S2_ATTN
from peft_longlora.hub.loading import load_part
from peft_longlora.training.names import check_modules
from peft_longlora.training.options import RunOptions


@dataclass(frozen=True)
class Sketch:
    """What is known of a run's model before its weights are loaded: numbers of trained and of all parameters.

    Attributes:
        commit: of a base on the Hub.
    """

    trained: int
    total: int
    commit: str | None = None


def load_tokenizer(options: RunOptions) -> PreTrainedTokenizerBase:
    """The tokenizer; one without a padding token pads with the end-of-sequence token.

    Raises: ValueError: it cannot be loaded.
    """
    name = options.tokenizer or options.model
    what = "tokenizer" if options.tokenizer else "model"
    tokenizer = load_part(AutoTokenizer, name, what, revision=_revision(options, name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def sketch(options: RunOptions, config: LongLoraConfig) -> Sketch:
    """Make base and adapter without memory for weights. `config` is not used again: it is filled in.

    Raises:
        ValueError, NotImplementedError: the architecture, its RoPE, or a part of the config is refused, or a name of
            modules is that of none.
    """
    from accelerate import init_empty_weights

    base = load_part(AutoConfig, options.model, "model", revision=options.model_revision)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(base, attn_implementation=S2_ATTN, dtype=torch.bfloat16)
        model.tie_weights()
        _configure(model, options)
        check_modules(model, config)
        adapted = get_peft_model(model, config)
    trained, total = adapted.get_nb_trainable_parameters()
    return Sketch(trained, total, getattr(base, "_commit_hash", None))


def load_adapted(options: RunOptions, config: LongLoraConfig, has_gpu: bool) -> PeftModel:
    """The base with its weights and a new adapter, ready to train; on the CPU, or with four_bit on the GPU.

    Raises: ValueError, ImportError: a part cannot be loaded.
    """
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_gpu else "float32"
    given: dict[str, Any] = dict(dtype=dtype, attn_implementation=S2_ATTN, revision=options.model_revision)
    if options.four_bit:
        stored = getattr(torch, dtype)  # as the other weights are, so that FSDP can share them out
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=stored,
            bnb_4bit_quant_storage=stored,
        )
    base = load_part(AutoModelForCausalLM, options.model, "model", **given)
    _configure(base, options)
    return get_peft_model(base, config)


def as_float(model: nn.Module) -> None:
    """Make all trained weights float32 again: TRL rounds those of a 4-bit base to bfloat16, too coarse to learn."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _configure(model: nn.Module, options: RunOptions) -> None:
    """Name the kernels. The adapter sets everything else of the attention, and keeps these names."""
    if options.attn_backend or options.dense_attention:
        configure_attention(model, backend=options.attn_backend, dense_attention=options.dense_attention)


def _revision(options: RunOptions, name: str) -> str | None:
    return options.model_revision if name == options.model else None

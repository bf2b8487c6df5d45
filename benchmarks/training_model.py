"""The models of benchmarks/training.py: real shapes, random weights, an adapter."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_longlora import LongLoraConfig


def make_model(
    shape: dict,
    length: int,
    group_size: int,
    device: str,
    *,
    four_bit: bool = False,
    embeddings: bool = True,
    dense: str | None = None,
) -> nn.Module:
    """A PEFT model of `shape` with random weights, ready to train at `length`.

    Args:
        dense: with full attention, by the kernel that PyTorch picks (sdpa) or by the fastest that is here.
    """
    config = LlamaConfig(**shape)
    base = make_four_bit(config, device) if four_bit else make_half(config, device)
    window = max(length, 2 * shape["max_position_embeddings"])
    adapter = LongLoraConfig(
        r=16,
        lora_alpha=32,
        context_length=window,
        rope_type="linear",
        group_size=None if dense else group_size,
        attention_pattern="full" if dense else "s2",
        train_embeddings=embeddings,
    )
    model = get_peft_model(base, adapter)
    if dense == "sdpa":
        model.get_base_model().set_attn_implementation("sdpa")
    model.config.use_cache = False
    return model.train()


def make_half(config: LlamaConfig, device: str) -> nn.Module:
    """All weights in bf16."""
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def make_four_bit(config: LlamaConfig, device: str) -> nn.Module:
    """Projections in NF4. Blocks are made one by one, so never more than one of them exists in bf16."""
    blocks = config.num_hidden_layers
    config.num_hidden_layers = 0
    model = make_half(config, device)
    config = model.config  # every block reads it; it may be a copy of the given one
    config.num_hidden_layers = blocks
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        for number in range(blocks):
            with torch.device(device):
                block = LlamaDecoderLayer(config, number)
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=config.initializer_range)
            quantise(block, device)
            model.model.layers.append(block)
    finally:
        torch.set_default_dtype(dtype)
    model.is_loaded_in_4bit = True  # as transformers marks it, for PEFT
    return model.requires_grad_(False)


def quantise(block: nn.Module, device: str) -> None:
    """Replace linear layers by bitsandbytes' NF4 layers with double quantisation, as `BitsAndBytesConfig` does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = dict(compress_statistics=True, quant_type="nf4")
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                size = child.in_features, child.out_features
                with torch.device("meta"):
                    small = Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16, **options)
                small.weight = Params4bit(child.weight.data, requires_grad=False, **options).to(device)
                setattr(parent, name, small)

"""The model of `scaling.py`: a Llama with random weights and LoRA, made layer by layer; copied to each GPU, or sharded.

Every process draws each layer from a seed of the layer's own, so all have the same weights on any number of GPUs. A
sharded layer is cut as soon as it is drawn, so a GPU never holds more than one whole layer beside its shards.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from peft import get_peft_model
from scaling_memory import PLAIN, Saving
from scaling_step import LossOf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_longlora import LongLoraConfig


def make_model(
    shape: dict,
    group_size: int,
    device: torch.device,
    saving: Saving = PLAIN,
    *,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype = torch.bfloat16,
    lora_b: float = 0.0,
) -> LossOf:
    """A PEFT model that trains LoRA on q, k, v, o, and gives the loss of a batch.

    Args:
        mesh: the ranks that share the weights, LoRA's too, with FSDP2; None: this process has all of them.
        dtype: of all weights. They are drawn in bfloat16, so in each dtype they have the same values.
        lora_b: spread of LoRA's B, which begins at 0 in training; then A has no gradient.
    """
    torch.manual_seed(0)
    # Without layers first: embeddings, the head and RoPE are made on the device.
    config = LlamaConfig(**{**shape, "num_hidden_layers": 0})
    with torch.device(device):
        base = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    base.config.num_hidden_layers = shape["num_hidden_layers"]
    with torch.device("meta"):
        layers = [LlamaDecoderLayer(base.config, number) for number in range(shape["num_hidden_layers"])]
    base.model.layers.extend(layers).to(torch.bfloat16)
    adapter = LongLoraConfig(
        context_length=2**21, rope_type="linear", group_size=group_size, train_embeddings=False, train_norms=False
    )
    model = get_peft_model(base, adapter, autocast_adapter_dtype=False).train()
    ends = [base.model.embed_tokens, base.lm_head, base.model.norm]
    for module in ends:
        module.to(dtype)
    if mesh:
        fully_shard(ends[0], mesh=mesh)
        # Called for some tokens at a time: between these calls of a forward it stays whole.
        fully_shard(ends[1], mesh=mesh, reshard_after_forward=False)
    for number, layer in enumerate(layers):
        layer.to_empty(device=device)
        draw(layer, number, base.config.initializer_range, lora_b)
        layer.to(dtype)
        if mesh:
            fully_shard(layer, mesh=mesh)
    saving.apply(model)
    whole = LossOf(model)
    if mesh:
        fully_shard(whole, mesh=mesh)
        # By itself FSDP2 brings the layer that ran before, and in blocks that may be one whose backward is over.
        for before, layer in pairwise(layers):
            layer.set_modules_to_backward_prefetch([before])
    return whole


def draw(layer: nn.Module, seed: int, spread: float, lora_b: float) -> None:
    """Random weights, as transformers and PEFT would draw them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_A" in name:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            elif "lora_B" in name:
                parameter.normal_(0, lora_b) if lora_b else parameter.zero_()
            elif parameter.dim() == 1:  # norms
                parameter.fill_(1)
            else:
                parameter.normal_(0, spread)


def share_held(model: nn.Module) -> float:
    """The part of all weights that this process holds between steps."""
    held = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        held += parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
    return held / total

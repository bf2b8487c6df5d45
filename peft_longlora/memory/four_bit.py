"""Which weights of a model bitsandbytes would store in 4 bits: those of plain linear layers, so no fused experts."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D


def four_bit_weights(config: PretrainedConfig) -> int:
    """Numbers that a base of this config stores in 4 bits. The model is made without memory for its weights.

    bitsandbytes converts `nn.Linear` and `Conv1D`. transformers holds the experts of most models as one parameter of
    three dimensions, which stays in half precision, as the output layer does (`replace_with_bnb_linear` and
    `get_keys_to_not_convert` of transformers).

    Args:
        config: of a text model.

    Raises:
        ValueError: transformers has no causal language model of this kind.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    kept = tuple(model._keep_in_fp32_modules or ())
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and module is not output
        if not any(part in kept for part in name.split("."))
    )

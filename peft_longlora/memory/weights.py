"""How many numbers a model of transformers holds, and which of them bitsandbytes would store in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Weights:
    """Numbers in a model's matrices, without embeddings and output layer.

    Attributes:
        blocks: of the text model.
        beside: of other parts, such as an image encoder.
        four_bit: those of both that a 4-bit base converts: plain linear layers, so no fused experts.
        experts: those of the blocks that are experts.
    """

    blocks: int
    beside: int
    four_bit: int
    experts: int


def count_weights(config: PretrainedConfig, experts: int = 1) -> Weights | None:
    """Count them in the model, which is made without memory for its weights.

    bitsandbytes converts `nn.Linear` and `Conv1D`. transformers holds the experts of most models as one parameter of
    three dimensions, which stays in half precision, as the output layer does (`replace_with_bnb_linear` and
    `get_keys_to_not_convert` of transformers).

    Args:
        config: of a whole model.
        experts: of a block. Their weights are parameters of three dimensions, of which the first is theirs.

    Returns:
        The numbers; None if transformers has no language model of this kind (a part of another model), or needs a
        package for it that is not installed.

    Raises:
        ValueError: transformers cannot make a model of this config.
    """
    model = _empty(config)
    if model is None:
        return None
    output = model.get_output_embeddings()
    tables = {id(module.weight) for module in (model.get_input_embeddings(), output) if module is not None}
    kept = tuple(model._keep_in_fp32_modules or ())
    inside, every = (_matrices(one, tables) for one in (model.get_decoder(), model))
    blocks = sum(map(torch.Tensor.numel, inside))
    routed = sum(one.numel() for one in inside if experts > 1 and one.dim() == 3 and len(one) >= experts)
    four_bit = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and module is not output
        if not any(part in kept for part in name.split("."))
    )
    return Weights(blocks, sum(map(torch.Tensor.numel, every)) - blocks, four_bit, routed)


def _matrices(model: nn.Module, without: set[int]) -> list[nn.Parameter]:
    return [one for one in model.parameters() if one.dim() > 1 and id(one) not in without]


def _empty(config: PretrainedConfig) -> PreTrainedModel | None:
    kinds = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    )
    kind = next((kind for mapping, kind in kinds if type(config) in mapping), None)
    try:
        with torch.device("meta"):
            return kind and kind.from_config(config)
    except ImportError:
        return None
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        name = config.model_type
        raise ValueError(f"model_type={name!r}: transformers cannot make a model of its config ({error}).") from error

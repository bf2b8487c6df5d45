"""Which layers of a model are those that attend to text, and how each of them sees it by itself."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig


def find_text_model(model: nn.Module) -> nn.Module:
    """The language model inside one that takes images or sounds too; the model itself where that is all of it."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or config.get_text_config() is config:
        return model
    return model.get_decoder()


def find_attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a language model, by name: modules of a class named so that know their layer's index."""
    of_text = set(find_text_model(model).modules())
    return {
        name: module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and hasattr(module, "layer_idx") and module in of_text
    }


def is_causal_layer(module: nn.Module) -> bool:
    """Whether no token sees a later one in an attention layer; transformers' layers say so of themselves."""
    return getattr(module, "is_causal", True)


def is_local_layer(module: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether a layer has a window or chunks of its own, which it keeps."""
    if layer_types := getattr(config, "layer_types", None):
        return layer_types[module.layer_idx] != "full_attention"
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)

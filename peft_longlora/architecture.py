"""Where a transformers model has its parts, which layers have a window, and which models are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel


def find_text_model(model: nn.Module) -> nn.Module:
    """The language model inside a multimodal model; the model itself if it is only a language model."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or config.get_text_config() is config:
        return model
    return model.get_decoder()


def cache_name(model: nn.Module) -> str:
    """The name of a model's cache, as an argument and in its output. transformers 5.24 renamed it.

    Returns: "cache", or "past_key_values" before transformers 5.24 and in older code on the Hub.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model  # PEFT's forward accepts any name
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def find_entrances(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that may be called from outside, each once.

    The backbone is one of them, because trainers that compute the loss themselves do not call the whole model.
    """
    return list(dict.fromkeys([model, getattr(model, "base_model", model), find_text_model(model)]))


def follow(
    model: nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None = None
) -> list[RemovableHandle]:
    """Call `before(module, args, kwargs)` before every call of a model, and `after(module, ...)` when it ends.

    One of these modules may call another. `after` is also called if a call fails.
    """
    handles = []
    for module in find_entrances(model):
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(after, always_call=True))
    return handles


def find_attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a language model by name: modules with "Attention" in the class name and a layer
    index."""
    of_text = set(find_text_model(model).modules())
    return {
        name: module
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and hasattr(module, "layer_idx") and module in of_text
    }


def is_causal_layer(module: nn.Module) -> bool:
    """Whether no token sees a later one in an attention layer; transformers' layers have an attribute for it."""
    return getattr(module, "is_causal", True)


def is_local_layer(module: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether a layer has its own window or chunks, which it keeps."""
    if layer_types := getattr(config, "layer_types", None):
        return any(name in layer_types[module.layer_idx] for name in ("sliding", "chunked", "window"))
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse a model that would silently train without S2-Attn.

    Raises: NotImplementedError.
    """
    if not hasattr(model, "_can_set_attn_implementation") or not hasattr(model, "config"):
        raise NotImplementedError(
            f"{type(model).__name__} is not a transformers model (PreTrainedModel), so there is no attention to "
            f"replace and no RoPE to rescale. Load one with AutoModelForCausalLM."
        )
    kind = getattr(model.config, "model_type", type(model).__name__)
    layers = find_attention_modules(model).values()
    if layers and not any(is_causal_layer(module) for module in layers):
        raise NotImplementedError(
            f"{kind} ({type(model).__name__}) is not a causal language model: its tokens see later ones, which groups "
            f"cannot express. Use a decoder (llama, qwen3, mistral, gemma3, gpt_neox, ...)."
        )
    if not model._can_set_attn_implementation() or not layers:
        raise NotImplementedError(
            f"{kind} ({type(model).__name__}) does not take its attention from transformers' attention interface, so "
            f"S2-Attn would never run. Use an architecture that does (llama, qwen3, mistral, gemma3, gpt_neox, ...)."
        )
    if not find_rotary_modules(model):
        raise NotImplementedError(
            f"{kind} ({type(model).__name__}) has no rotary position embeddings that could be rescaled, so its window "
            f"cannot be extended. Use a rotary architecture (llama, qwen3, mistral, gemma3, gpt_neox, ...)."
        )


def find_rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold inverse frequencies and can compute them from a config."""
    return [
        module
        for module in find_text_model(model).modules()
        if "RotaryEmbedding" in type(module).__name__
        and hasattr(module, "config")
        and any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


def rows_of(embeddings: nn.Module) -> int:
    """The number of tokens of an embedding layer, even if its weight is in another process (DeepSpeed ZeRO-3)."""
    return getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]


# How a layer's forward names the cache: since transformers 5.24, before, and in Mamba layers before.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")


def find_state_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a language model in which a token reaches later ones by another way than attention, by name.

    They hold a recurrent state, or the last inputs of a convolution. Such a layer holds a convolution, or takes a
    cache without calling transformers' attention. Blocks that only contain such layers, or attention, are left out.
    """
    of_text, layers = set(find_text_model(model).modules()), {}
    for name, module in model.named_modules():
        convolves = any(isinstance(one, nn.Conv1d) for one in module.children())
        holds = _takes_cache(module) and not any(_takes_cache(one) for one in module.modules() if one is not module)
        if module in of_text and (convolves or holds) and not _calls_attention(module):
            layers[name] = module
    return layers


def _takes_cache(module: nn.Module) -> bool:
    return _takes_a_cache(type(module))


@cache
def _takes_a_cache(kind: type[nn.Module]) -> bool:
    return any(name in inspect.signature(kind.forward).parameters for name in CACHE_ARGUMENTS)


def _calls_attention(module: nn.Module) -> bool:
    return _calls_the_attention(type(module))


@cache
def _calls_the_attention(kind: type[nn.Module]) -> bool:
    """Whether a class calls transformers' attention interface; its source says so, as transformers itself reads it."""
    own = [one for one in kind.__mro__ if issubclass(one, nn.Module) and one is not nn.Module]
    return any("ALL_ATTENTION_FUNCTIONS" in inspect.getsource(one) for one in own)

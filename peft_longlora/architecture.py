"""Where a transformers model has its parts, which layers have a window, and which models are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any

import torch
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
    return "cache" if takes(model, "cache") else "past_key_values"


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a model has an argument of this name."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model  # PEFT's forward accepts any name
    return argument in inspect.signature(model.forward).parameters


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


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """After the block each module is in the mode, training or evaluation, in which it was before.

    `model.train()` alone would train what its user has set to evaluation, such as a frozen part with dropout.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def text_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a language model by name, without encoders of images and sounds.

    An encoder may stand beside the language model or inside it; it is a model with another class of config.
    """
    text = find_text_model(model)
    config = text.config.get_text_config() if isinstance(getattr(text, "config", None), PreTrainedConfig) else None
    of_text, inside = set(text.modules()), set()
    for part in text.modules():
        if isinstance(part, PreTrainedModel) and not isinstance(
            part.config.get_text_config(decoder=True), type(config)
        ):
            inside.update(part.modules())
    return {name: module for name, module in model.named_modules() if module in of_text and module not in inside}


def find_attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a language model by name: modules with a layer index that call transformers'
    attention interface."""
    return {
        name: module
        for name, module in text_modules(model).items()
        if hasattr(module, "layer_idx") and _calls_attention(type(module))
    }


def is_causal_layer(module: nn.Module) -> bool:
    """Whether no token sees a later one in an attention layer; transformers' layers have an attribute for it."""
    return getattr(module, "is_causal", True)


def is_local_layer(module: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether a layer has its own window or chunks, which it keeps."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types and module.layer_idx is not None:  # a layer that several places share may have no index
        return is_local_type(layer_types[module.layer_idx])
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def has_chunks(module: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether a config says that a layer has chunks of its own."""
    layer_types = getattr(config, "layer_types", None) or ()
    if not any("chunked" in one for one in layer_types):  # a compiled block that reads its number serves no other block
        return False
    index = getattr(module, "layer_idx", None)
    return index is not None and "chunked" in layer_types[index]


def is_local_type(layer_type: str) -> bool:
    """Whether transformers calls layers with a window or chunks of their own so."""
    return any(name in layer_type for name in ("sliding", "chunked", "window"))


def one_of(config: PreTrainedConfig, name: str) -> Any:
    """A number of all layers; None if a config has none, or if its layers have numbers of their own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' heterogeneous configs refuse to name one for all layers
        return None


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
    if not layers:
        raise NotImplementedError(
            f"{kind} ({type(model).__name__}) does not take its attention from transformers' attention interface, so "
            f"S2-Attn would never run. Use an architecture that does (llama, qwen3, mistral, gemma3, gpt_neox, ...)."
        )


def check_masks(model: PreTrainedModel) -> None:
    """Refuse a model whose layers would get another mask than their own under S2-Attn.

    Raises: NotImplementedError.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    layers = find_attention_modules(model).values()
    asking = [one for module in layers for one in module.modules() if _names_attentions(type(one))]
    if asking:
        raise NotImplementedError(
            f"{kind} ({type(model).__name__}) chooses keys with a mask of its own, which {type(asking[0]).__name__} "
            f"makes only for attentions of certain names, so under S2-Attn it would be another model. Use an "
            f"architecture that leaves the mask to its attention (llama, qwen3, mistral, gemma3, gpt_neox, ...)."
        )


def find_rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold inverse frequencies and can compute them from the language model's config."""
    text = find_text_model(model)
    kind = (
        type(text.config.get_text_config()) if isinstance(getattr(text, "config", None), PreTrainedConfig) else object
    )
    return [
        module
        for module in text_modules(model).values()
        if "RotaryEmbedding" in type(module).__name__
        and isinstance(getattr(module, "config", None), kind)
        and any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


def rows_of(embeddings: nn.Module) -> int:
    """The number of tokens of an embedding layer, even if its weight is in another process (DeepSpeed ZeRO-3)."""
    return getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]


# How a forward names the cache: since transformers 5.24, before, and in Mamba layers before.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")


def has_liger_kernels(model: nn.Module) -> bool:
    """Whether Liger's kernels, which need a GPU, compute norms or feed-forward layers of a model.

    Liger replaces transformers' classes for the whole process: models that are made later have its kernels too.
    """
    for module in model.modules():
        own = vars(module).get("forward")  # a loaded module gets the kernel as a forward of its own
        for part in (type(module), getattr(own, "__func__", own)):
            if getattr(part, "__module__", "").partition(".")[0] == "liger_kernel":
                return True
    return False


def find_state_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a language model in which a token reaches later ones by another way than attention, by name.

    They hold a recurrent state, or the last inputs of a convolution. Such a layer holds a convolution, or takes a
    cache without calling transformers' attention. Blocks that only contain such layers, or attention, are left out; so
    are blocks of the same class that contain another kind of layer (Nemotron-H).
    """
    layers, modules = {}, text_modules(model)
    blocks = {
        type(module)
        for module in modules.values()
        if _takes_cache(type(module)) and any(_takes_cache(type(one)) for one in module.modules() if one is not module)
    }
    for name, module in modules.items():
        convolves = any(isinstance(one, nn.Conv1d) for one in module.children())
        holds = _takes_cache(type(module)) and type(module) not in blocks
        if (convolves or holds) and not isinstance(module, PreTrainedModel) and not _calls_attention(type(module)):
            layers[name] = module
    return layers


@cache
def _takes_cache(kind: type[nn.Module]) -> bool:
    return any(name in inspect.signature(kind.forward).parameters for name in CACHE_ARGUMENTS)


@cache
def _calls_attention(kind: type[nn.Module]) -> bool:
    """Whether a class calls transformers' attention interface."""
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in _codes(kind))


@torch.compiler.assume_constant_result  # not of a cached function: PyTorch looks into the function below the cache
def counts_tokens(kind: type[nn.Module]) -> bool:
    """Whether a class of layers counts tokens from the start of its row or cache, not by the positions it is given."""
    return _counts_tokens(kind)


@torch.compiler.disable  # where a graph breaks, PyTorch would compile this by itself, and warn of the cache
@cache
def _counts_tokens(kind: type[nn.Module]) -> bool:
    return any({"arange", "get_seq_length"} <= set(code.co_names) for code in _codes(kind))


def counts_from(module: nn.Module) -> int:
    """The length of rows up to which the count of a layer that `counts_tokens` changes nothing: it scales queries by
    their place, and transformers calls the place of the first step, counted from 1, `floor_scale`."""
    return max(0, getattr(module, "floor_scale", 0) - 1)


@cache
def _names_attentions(kind: type[nn.Module]) -> bool:
    """Whether a class does something else for an attention of a certain name."""
    constants = [constant for code in _codes(kind) for constant in code.co_consts]
    flat = [one for x in constants for one in (x if isinstance(x, tuple | frozenset) else (x,))]
    return any(name in ("sdpa", "eager") for name in flat)


def _codes(kind: type[nn.Module]) -> Iterator[CodeType]:
    """The compiled code of a class's methods, inherited ones included; that of torch's own class is left out."""
    for one in kind.__mro__:
        if one in (nn.Module, PreTrainedModel) or not issubclass(one, nn.Module):
            continue
        for value in vars(one).values():
            function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
            waiting = [code] if isinstance(code := getattr(function, "__code__", None), CodeType) else []
            while waiting:
                yield (code := waiting.pop())
                waiting += [inner for inner in code.co_consts if isinstance(inner, CodeType)]

"""Which modules an adapter trains: projections, embeddings, norms. They are found by type, not by name.

`model` calls it before anything is injected. Knows nothing of PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn
from transformers import PreTrainedModel

from peft_longlora.architecture import find_attention_modules, find_rotary_modules, text_modules


def find_projections(model: PreTrainedModel) -> list[str]:
    """Names of the q, k, v and o projections: every linear layer inside the attention modules.

    Returns:
        The fewest and shortest suffixes that match exactly these, such as ["k_proj", "o_proj", "q_proj", "v_proj"].
    """
    attentions = tuple(f"{name}." for name in find_attention_modules(model))
    return _select(model, lambda name, module: name.startswith(attentions) and _is_linear(module))


def find_embeddings(model: PreTrainedModel) -> list[str]:
    """Full name of the module that `get_input_embeddings()` returns. PEFT uses this name when it ties the module."""
    return [name for name, _ in find_module(model, model.get_input_embeddings())]


def find_rotary(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The base's own rotary modules by their full names."""
    rotary = set(find_rotary_modules(model))
    return {name: module for name, module in named_modules(model) if module in rotary}


def find_module(model: nn.Module, wanted: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """The full names of one of the model's own modules, and the module; wrappers of adapters are looked through."""
    wanted = None if wanted is None else _unwrap(wanted)
    return [(name, module) for name, module in named_modules(model) if module is wanted]


def find_norms(model: PreTrainedModel) -> list[str]:
    """Names of all normalisation modules of the language model that have weights, q and k norms included.

    Returns: suffixes as `find_projections` does, such as ["input_layernorm", "norm", "post_attention_layernorm"].
    """
    of_text = set(text_modules(model).values())
    return _select(model, lambda name, module: _is_norm(module) and module in of_text)


def named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by name; wrappers of adapters are looked through."""
    inner = _unwrap(module)
    yield prefix, inner
    if inner is module:
        for name, child in module.named_children():
            yield from named_modules(child, f"{prefix}.{name}" if prefix else name)


def _unwrap(module: nn.Module) -> nn.Module:
    inner = getattr(module, "base_layer", getattr(module, "original_module", None))
    return inner if isinstance(inner, nn.Module) else module


def _select(model: nn.Module, is_wanted: Callable[[str, nn.Module], bool]) -> list[str]:
    modules = list(named_modules(model))
    return shorten([name for name, module in modules if is_wanted(name, module)], [name for name, _ in modules])


def shorten(names: list[str], all_names: list[str]) -> list[str]:
    """Suffixes of `names` that match all of them and, by PEFT's rule of `endswith`, nothing else in `all_names`.

    Example: (["a.1.norm", "a.2.norm"], ["a.1.norm", "a.2.norm", "a.1.mlp"]) -> ["norm"].
    """
    wanted, suffixes = set(names), set()
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            suffix = ".".join(parts[-count:])
            if all(other in wanted for other in all_names if other.endswith(suffix)):
                break
        suffixes.add(suffix)
    return sorted(suffixes)


def _is_linear(module: nn.Module) -> bool:
    # Some quantised linear layers (bitsandbytes, GPTQ, AWQ ...) are not subclasses of nn.Linear.
    return isinstance(module, nn.Linear) or ("Linear" in type(module).__name__ and hasattr(module, "in_features"))


def _is_norm(module: nn.Module) -> bool:
    is_named_so = "norm" in type(module).__name__.lower() and not any(True for _ in module.children())
    is_torch = isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)
    return (is_torch or is_named_so) and any(True for _ in module.parameters(recurse=False))

"""Rescale the rotary embeddings of a loaded model, in place and reversibly.

The result equals saving the model and loading it again with the new config. Called by `model` when an adapter is
added, switched off or removed, and by users who train without an adapter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

ROPE_TYPES = ("linear", "ntk", "dynamic", "yarn", "llama3", "longrope")
# Types whose configs keep the pretrained length in max_position_embeddings: readers multiply it by the factor.
KEEP_LENGTH = ("linear", "dynamic")
STATES = "longlora_rope"


@dataclass
class RopeState:
    """Everything that RoPE is made of in one model, so that it can be put back bit for bit.

    Attributes:
        rope_parameters, max_position_embeddings, head_dim: of the text config.
        modules: (rotary module, its buffers, its plain attributes).
    """

    rope_parameters: dict[str, Any] | None
    max_position_embeddings: int
    head_dim: int | None
    modules: list[tuple[nn.Module, dict[str, torch.Tensor], dict[str, Any]]] = field(repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> RopeState:
        """What RoPE of `model` is made of now."""
        config = model.config.get_text_config()
        modules = [(m, dict(m.named_buffers(recurse=False)), _attributes(m)) for m in find_rotary_modules(model)]
        head_dim = getattr(config, "head_dim", None)
        return cls(copy.deepcopy(config.rope_parameters), config.max_position_embeddings, head_dim, modules)

    def put_on(self, model: PreTrainedModel) -> None:
        """Give `model` this RoPE."""
        config = model.config.get_text_config()
        config.rope_parameters = copy.deepcopy(self.rope_parameters)
        config.max_position_embeddings = self.max_position_embeddings
        if hasattr(config, "head_dim"):
            config.head_dim = self.head_dim
        for module, buffers, attributes in self.modules:
            _transplant(module, buffers, attributes)


def find_rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold inverse frequencies and can make them anew from a config."""
    return [
        module
        for module in model.modules()
        if "RotaryEmbedding" in type(module).__name__
        and hasattr(module, "config")
        and any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


def base_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The rope_parameters of the layers with full attention (configs may hold one dict a layer type)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters["full_attention"] if _is_nested(parameters) else parameters


def window_of(config: PreTrainedConfig) -> int:
    """The context window in tokens that a config states, its RoPE scaling included.

    Source: the rule by which serving engines derive a model's length: for "linear" and "dynamic" the stored length
    times the factor, for all others the stored length.
    """
    rope = base_rope(config)
    if rope.get("rope_type") in KEEP_LENGTH:
        return int(config.max_position_embeddings * rope.get("factor", 1.0))
    return config.max_position_embeddings


def scale_rope(
    model: PreTrainedModel,
    context_length: int | None = None,
    *,
    rope_type: str = "yarn",
    rope_parameters: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Rescale RoPE on a loaded model to a longer window.

    Args:
        model: a rotary model of transformers.
        context_length: the new window, tokens. None, or not above the model's own window: nothing is done, unless
            rope_parameters is given.
        rope_type: "linear" (Position Interpolation, arXiv:2306.15595, the paper's), "ntk" (theta raised once by
            factor ** (d / (d - 2))), "dynamic" (the same, growing with the row), "yarn" (arXiv:2309.00071), "llama3";
            "longrope" needs rope_parameters.
        rope_parameters: transformers' own dict, used as it is (rope_theta and partial_rotary_factor are taken over
            where it has none). For a base that holds one dict a layer type: the one for full attention, or a dict of
            those to replace.

    Returns:
        The rope_parameters now in force (of full attention layers, unless one dict a layer type was given), or None
        if nothing was done.

    Raises:
        ValueError: an unknown rope_type, both rope_type and rope_parameters, a model whose RoPE is scaled already.
        NotImplementedError: no rotary module, or one that cannot be made anew from a config.
    """
    config = model.config.get_text_config()
    check_rope(rope_type, rope_parameters)
    if context_length is not None and (type(context_length) is not int or context_length < 1):
        raise ValueError(f"context_length={context_length!r} must be a positive number of tokens, or None.")
    if not find_rotary_modules(model):
        raise NotImplementedError(f"{type(model).__name__} has no rotary position embeddings that could be rescaled.")
    if hasattr(model, STATES):
        raise ValueError("RoPE of this model is rescaled already. Call restore_rope(model) first.")
    if rope_parameters is None and (context_length is None or context_length <= window_of(config)):
        return None
    if rope_parameters is None:
        _refuse_scaled(config)
        new, length = _scaled_parameters(model, context_length, rope_type)
    else:
        new, length = dict(rope_parameters), _stated_length(config, context_length, rope_parameters)
    base = RopeState.of(model)
    try:
        _apply(model, new, length)
    except Exception:
        base.put_on(model)
        raise
    setattr(model, STATES, (base, RopeState.of(model)))
    return copy.deepcopy(config.rope_parameters if _is_nested(new) else base_rope(config))


def restore_rope(model: PreTrainedModel) -> None:
    """Undo `scale_rope`, bit for bit. Nothing happens if it was never called."""
    if hasattr(model, STATES):
        getattr(model, STATES)[0].put_on(model)
        delattr(model, STATES)


def keep_rope(model: PreTrainedModel) -> None:
    """Forget the base's RoPE: the rescaled one is the model's own from now on."""
    if hasattr(model, STATES):
        delattr(model, STATES)


def switch_rope(model: PreTrainedModel, *, scaled: bool) -> None:
    """Put the base's or the rescaled RoPE in force, keeping both at hand."""
    if hasattr(model, STATES):
        getattr(model, STATES)[int(scaled)].put_on(model)


def keep_float32(model: PreTrainedModel) -> None:
    """Put the frequencies back that `model.to(torch.bfloat16)` has rounded. Costs a look at each rotary module."""
    if hasattr(model, STATES):
        scaled = getattr(model, STATES)[1]
        for module, buffers, _ in scaled.modules:
            if any(module.get_buffer(n).dtype != b.dtype for n, b in buffers.items() if n in module._buffers):
                _transplant(module, buffers, _attributes(module))


def check_rope(rope_type: str, rope_parameters: dict[str, Any] | None) -> None:
    """Refuse what no model could be given.

    Raises: ValueError.
    """
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is unknown. Use one of {', '.join(map(repr, ROPE_TYPES))}.")
    if rope_parameters is not None:
        if not isinstance(rope_parameters, dict):
            raise ValueError(
                f"rope_parameters={rope_parameters!r} must be a dict as in a transformers config, for example "
                f"{{'rope_type': 'linear', 'factor': 4.0}}. Use rope_type for a name alone."
            )
        for parameters in rope_parameters.values() if _is_nested(rope_parameters) else (rope_parameters,):
            if parameters is not None:
                _check_parameters(rope_type, parameters)
    elif rope_type == "longrope":
        raise ValueError(
            "rope_type='longrope' needs factors that a search found for one model. Give rope_parameters with "
            "rope_type, short_factor, long_factor and original_max_position_embeddings."
        )


def _check_parameters(rope_type: str, parameters: dict[str, Any]) -> None:
    if rope_type != "yarn" and parameters.get("rope_type") != rope_type:
        raise ValueError(
            f"rope_type={rope_type!r} and rope_parameters={parameters!r} exclude each other: rope_parameters is used "
            f"as it is. Give one of them."
        )
    factor = parameters.get("factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor >= 1:
        raise ValueError(
            f"rope_parameters={parameters!r}: factor={factor!r} must be a number, 1 or more: the new window over the "
            f"base's."
        )
    if "rope_type" not in parameters:
        raise ValueError(f"rope_parameters={parameters!r} lacks 'rope_type'. Add it, as transformers wants it.")
    if parameters["rope_type"] in ("linear", "dynamic", "yarn", "llama3") and "factor" not in parameters:
        raise ValueError(f"rope_parameters={parameters!r} lacks 'factor': the new window over the base's. Add it.")


def _refuse_scaled(config: PreTrainedConfig) -> None:
    rope = base_rope(config)
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"The base's RoPE is scaled already ({rope}), and scalings do not add up. Give the whole new "
            f"rope_parameters, as transformers wants them (for example {{**base, 'factor': ...}})."
        )


def _scaled_parameters(model: PreTrainedModel, context_length: int, rope_type: str) -> tuple[dict[str, Any], int]:
    """The new entries of rope_parameters and the max_position_embeddings that goes with them."""
    config = model.config.get_text_config()
    window = config.max_position_embeddings
    factor = context_length / window
    if rope_type == "linear" or rope_type == "dynamic":
        return {"rope_type": rope_type, "factor": factor}, window
    if rope_type == "ntk":
        buffers = dict(find_rotary_modules(model)[0].named_buffers())
        dim = 2 * buffers.get("full_attention_inv_freq", buffers.get("inv_freq")).numel()
        theta = base_rope(config)["rope_theta"] * factor ** (dim / (dim - 2))
        return {"rope_type": "default", "rope_theta": theta}, context_length
    new = {"rope_type": rope_type, "factor": factor, "original_max_position_embeddings": window}
    if rope_type == "llama3":  # the band edges of the Llama 3.1 release
        new |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return new, context_length


def _stated_length(config: PreTrainedConfig, context_length: int | None, rope_parameters: dict[str, Any]) -> int:
    """max_position_embeddings for rope_parameters that the user gave."""
    window = config.max_position_embeddings
    if _is_nested(rope_parameters):
        rope_parameters = rope_parameters.get("full_attention") or base_rope(config)
    kind = rope_parameters["rope_type"]
    if kind in KEEP_LENGTH:
        return window
    if kind == "yarn" and "factor" in rope_parameters:
        return int(rope_parameters["factor"] * rope_parameters.get("original_max_position_embeddings", window))
    return context_length or window


def _is_nested(parameters: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in parameters.values())


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new parameters of one kind of layer: what is no scaling is taken over where it is not given."""
    return {**{key: old[key] for key in ("rope_theta", "partial_rotary_factor") if key in old}, **new}


def _apply(model: PreTrainedModel, new: dict[str, Any], length: int) -> None:
    """Write the config and give every rotary module the buffers that a fresh one would have."""
    config = model.config.get_text_config()
    parameters = copy.deepcopy(config.rope_parameters)
    if not _is_nested(parameters):
        if _is_nested(new):
            raise ValueError(
                f"rope_parameters={new} holds one dict a layer type, but {config.model_type} has one for all: "
                f"{parameters}. Give a dict of that form."
            )
        config.rope_parameters = _merge(parameters, new)
    else:
        changes = new if _is_nested(new) else {"full_attention": new}
        if unknown := sorted(changes.keys() - parameters.keys()):
            raise NotImplementedError(
                f"{config.model_type} keeps rope_parameters for {sorted(parameters)}, not for {unknown}, so it is "
                f"unclear what to rescale. Give rope_parameters as a dict of these layer types."
            )
        merged = {key: _merge(parameters[key] or {}, value) for key, value in changes.items() if value is not None}
        config.rope_parameters = {**parameters, **merged}
    if hasattr(config, "kv_lora_rank") and any(p.get("mscale_all_dim") for p in (parameters, config.rope_parameters)):
        raise NotImplementedError(
            f"Latent attention ({config.model_type}) takes mscale_all_dim from rope_parameters when the model is "
            f"built, so it cannot be rescaled afterwards. Give rope_parameters={new} to from_pretrained instead."
        )
    config.max_position_embeddings = length
    if getattr(config, "head_dim", 0) is None:
        # Models read None as this quotient, but transformers' scaled RoPE does not (mixtral): state it.
        config.head_dim = config.hidden_size // config.num_attention_heads
    try:
        config.standardize_rope_params()
        config.validate_rope()
        donors = [_fresh(module, config) for module in find_rotary_modules(model)]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"rope_parameters={new} cannot be used for {config.model_type}: {error}. Give rope_parameters that this "
            f"architecture takes, or use rope_type='ntk', which needs no scaled type."
        ) from error
    for module, donor in zip(find_rotary_modules(model), donors, strict=True):
        buffers = dict(donor.named_buffers(recurse=False))
        for name, old_buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and name in buffers and buffers[name].shape != old_buffer.shape:
                raise NotImplementedError(
                    f"transformers computes {config.model_type}'s {name} with shape {tuple(buffers[name].shape)} for "
                    f"rope_parameters={new}, the model has {tuple(old_buffer.shape)}. Use rope_type='ntk'."
                )
        _transplant(module, buffers, _attributes(donor))


def _fresh(module: nn.Module, config: PreTrainedConfig) -> nn.Module:
    with torch.device("cpu"):
        return type(module)(config)


def _attributes(module: nn.Module) -> dict[str, Any]:
    others = ("training", "config", "forward")  # "forward": accelerate's hooks (device_map) put one on the instance
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k not in others}


def _transplant(module: nn.Module, buffers: dict[str, torch.Tensor], attributes: dict[str, Any]) -> None:
    """Give a module other buffers and attributes, keeping the object itself, which hooks and users may hold."""
    device = next(module.buffers()).device
    for name in _attributes(module).keys() - attributes.keys():
        delattr(module, name)  # "longrope" leaves frequencies behind here that belong to the old scaling
    for name in dict(module.named_buffers(recurse=False)).keys() - buffers.keys():
        delattr(module, name)
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer.to(device), persistent=False)
    for name, value in attributes.items():
        setattr(module, name, value)

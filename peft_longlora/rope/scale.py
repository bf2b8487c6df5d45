"""Rescale the rotary embeddings of a loaded model, in place and reversibly.

The result equals saving the model and loading it again with the new config. `adapter.model` calls this file when an
adapter is added, switched off or removed; users who train without an adapter call it themselves.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peft_longlora.architecture import find_rotary_modules
from peft_longlora.rope.absent import check_nothing_asked, check_positions, is_positionless
from peft_longlora.rope.named import refuse_scaled, scaled_parameters
from peft_longlora.rope.parameters import (
    base_rope,
    check_form,
    check_rope,
    completed,
    full_type,
    is_nested,
    stated_length,
    window_of,
)
from peft_longlora.rope.state import OWNER, STATES, RopeState, attributes_of, fresh, transplant
from peft_longlora.rope.values import MOST_TOKENS, check_values, kept_entries


def scale_rope(
    model: PreTrainedModel,
    context_length: int | None = None,
    *,
    rope_type: str = "yarn",
    rope_parameters: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Rescale RoPE on a loaded model to a longer window.

    Args:
        model: a rotary model of transformers, or a `PeftModel` of another PEFT method on one.
        context_length: the new window, tokens. If it is None, or not above the model's own window, nothing is done,
            unless rope_parameters is given.
        rope_type: "linear" (Position Interpolation, arXiv:2306.15595, as in the paper), "ntk" (theta raised once by
            factor ** (d / (d - 2))), "dynamic" (the same, growing with the row), "yarn" (arXiv:2309.00071), "llama3";
            "longrope" needs rope_parameters.
        rope_parameters: the dict of transformers' configs, used unchanged. Entries of the base that are not a scaling,
            such as rope_theta and mrope_section, are kept if it has none. If the base holds one dict for each layer
            type: the dict for full attention, or a dict of the layer types to replace.

    Returns:
        The rope_parameters now in use (those of full attention layers, unless you gave one dict for each layer type),
        or None if no RoPE was changed. Where full attention has no position embeddings at all, as in Jamba or in
        Granite 4's hybrids, only the window in the config is raised.

    Raises:
        ValueError: an unknown rope_type, both rope_type and rope_parameters, a model whose RoPE is scaled already
            or belongs to an adapter.
        NotImplementedError: positions that are no RoPE of transformers, or one that a config cannot rebuild.
    """
    model = _without_owner(model)
    config = model.config.get_text_config()
    check_rope(rope_type, rope_parameters)
    if rope_type == "learned":
        raise ValueError(
            "rope_type='learned' trains factors, which an adapter holds: give it to LongLoraConfig. Without an "
            "adapter use 'yarn', with whose factors the training starts."
        )
    context_length = None if context_length is None else _tokens(context_length)
    check_positions(model)
    if find_rotary_modules(model):
        check_form(config)
    if hasattr(model, STATES):
        raise ValueError("RoPE of this model is rescaled already. Call restore_rope(model) first.")
    is_longer = context_length is not None and context_length > window_of(config)
    if is_positionless(model):
        check_nothing_asked(model, rope_type, rope_parameters)
        if is_longer:
            base = RopeState.of(model)
            config.max_position_embeddings = context_length
            setattr(model, STATES, (base, RopeState.of(model)))
        return None
    if rope_parameters is None and not is_longer:
        return None
    if rope_parameters is None:
        refuse_scaled(config)
        new, length = scaled_parameters(model, context_length, rope_type)
        check_values(new)
    else:
        new = completed(rope_parameters, config)
        length = stated_length(config, context_length, new)
    base = RopeState.of(model)
    try:
        _apply(model, new, length)
    except BaseException:
        base.put_on(model)
        raise
    setattr(model, STATES, (base, scaled := RopeState.of(model)))
    scaled.keep()
    return copy.deepcopy(config.rope_parameters if is_nested(new) else base_rope(config))


def _tokens(context_length: Any) -> int:
    """A number of Python, numpy or torch as an int."""
    try:
        tokens = 0 if type(context_length).__name__.startswith("bool") else operator.index(context_length)
    except TypeError:
        tokens = 0
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(
            f"context_length={context_length!r} must be a positive number of tokens, at most 2**40, or None."
        )
    return tokens


def restore_rope(model: PreTrainedModel) -> None:
    """Undo `scale_rope`, bit for bit. If it was never called, nothing happens.

    Args:
        model: the model that `scale_rope` was given.

    Raises:
        ValueError: the RoPE is an adapter's.
    """
    model = _without_owner(model)
    if hasattr(model, STATES):
        base, scaled = getattr(model, STATES)
        scaled.let_go()
        base.put_on(model)
        delattr(model, STATES)


def _without_owner(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, unless a LongLoRA adapter scales its RoPE."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise NotImplementedError(
            f"{type(base).__name__} is not a transformers model, so there is no RoPE to rescale. Load one with "
            f"AutoModelForCausalLM.from_pretrained."
        )
    if hasattr(base, OWNER):
        raise ValueError(
            f"The RoPE of this {type(base).__name__} is its LongLoRA adapter's: it is switched and removed with the "
            f"adapter. For the base's RoPE use model.disable_adapter() or model.unload(); for another scaling give "
            f"LongLoraConfig another context_length or rope_parameters."
        )
    return base


def keep_rope(model: PreTrainedModel) -> None:
    """Forget the base's RoPE: from now on the rescaled RoPE is the model's own."""
    if hasattr(model, STATES):
        getattr(model, STATES)[1].let_go()
        delattr(model, STATES)


def rewrite_rope(model: PreTrainedModel, new: dict[str, Any]) -> None:
    """Replace the scaling in force by another one for the same window."""
    _apply(model, new, model.config.get_text_config().max_position_embeddings)


def switch_rope(model: PreTrainedModel, *, scaled: bool) -> None:
    """Use the base's RoPE or the rescaled one; both are kept."""
    if hasattr(model, STATES):
        states = getattr(model, STATES)
        states[1].let_go()
        states[int(scaled)].put_on(model)
        if scaled:
            states[1].keep()


def _apply(model: PreTrainedModel, new: dict[str, Any], length: int) -> None:
    """Write the config, and give every rotary module the buffers that a newly made one would have."""
    config, modules = model.config.get_text_config(), find_rotary_modules(model)
    is_valid = _is_valid(model)
    config.rope_parameters = _combined(config, new)
    config.max_position_embeddings = length
    if "head_dim" in vars(config) and vars(config)["head_dim"] is None:
        # Models read None as this quotient, but transformers' scaled RoPE does not (mixtral), so write the number.
        config.head_dim = config.hidden_size // config.num_attention_heads
    _check_factors(config, modules)
    try:
        config.standardize_rope_params()
        config.validate_rope()
        if is_valid:  # rules of the architecture, without which the saved config could not be read
            _validate(model)
        donors = [fresh(module, config) for module in modules]
    except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise ValueError(
            f"rope_parameters={new} cannot be used for {config.model_type}: {error}. Give rope_parameters that this "
            f"architecture accepts, or use rope_type='ntk', which needs no scaled type."
        ) from error
    for module, donor in zip(modules, donors, strict=True):
        buffers = dict(donor.named_buffers(recurse=False))
        _check_buffers(buffers, module, f"rope_parameters={new}", config.model_type)
        transplant(module, buffers, attributes_of(donor))


def _combined(config: PreTrainedConfig, new: dict[str, Any]) -> dict[str, Any]:
    """The rope_parameters of a config with new entries. Where they are one dict for each layer type, `new` is for full
    attention, or has such dicts itself."""
    old, kind = config.rope_parameters, config.model_type
    if is_nested(new) and not is_nested(old):
        raise ValueError(
            f"rope_parameters={new} holds one dict for each layer type, but {kind} has one dict for all layers: {old}. "
            f"Give a dict of that form."
        )
    if not is_nested(old):
        combined = _merge(old, new)
    else:
        changes = new if is_nested(new) else {full_type(old): new}
        if unknown := sorted(changes.keys() - old.keys()):
            raise NotImplementedError(
                f"{kind} keeps rope_parameters for {sorted(old)}, not for {unknown}, so it is unclear what to rescale. "
                f"Give rope_parameters as a dict of these layer types."
            )
        combined = {**old, **{k: _merge(old[k] or {}, change) for k, change in changes.items() if change is not None}}
    if hasattr(config, "kv_lora_rank") and any(each.get("mscale_all_dim") for each in (old, combined)):
        raise NotImplementedError(
            f"Latent attention ({kind}) takes mscale_all_dim from rope_parameters when the model is built, so it "
            f"cannot be rescaled afterwards. Give rope_parameters={new} to from_pretrained instead."
        )
    return combined


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new parameters of one kind of layer; entries that are not a scaling are kept if `new` has none."""
    return {**kept_entries(old), **new}


def _check_factors(config: PreTrainedConfig, modules: list[nn.Module]) -> None:
    """Refuse lists of factors with another length than the list of frequencies.

    transformers warns only, and fails in the first row that is long enough for the other list.
    """
    rope = config.rope_parameters
    for kind, parameters in rope.items() if is_nested(rope) else [(None, rope)]:
        buffer = "inv_freq" if kind is None else f"{kind}_inv_freq"
        counts = {len(module._buffers[buffer]) for module in modules if module._buffers.get(buffer) is not None}
        for name in ("short_factor", "long_factor") if (parameters or {}).get("rope_type") == "longrope" else ():
            factors = parameters.get(name)
            if isinstance(factors, list | tuple) and len(counts) == 1 and len(factors) not in counts:
                raise ValueError(
                    f"rope_parameters={parameters}: {name} has {len(factors)} factors, and {config.model_type} has "
                    f"{counts.pop()} frequencies. Give one factor for each frequency."
                )


def _check_buffers(buffers: dict[str, torch.Tensor], module: nn.Module, asked: str, kind: str) -> None:
    """Refuse frequencies that no rotary module can use, or not this one."""
    if not all(buffer.isfinite().all() for buffer in buffers.values()):
        raise ValueError(f"{asked} give {kind} frequencies that are not finite numbers.")
    for name, old in module.named_buffers(recurse=False):
        if name.endswith("inv_freq") and name in buffers and buffers[name].shape != old.shape:
            raise NotImplementedError(
                f"transformers computes {kind}'s {name} with shape {tuple(buffers[name].shape)} for {asked}, the model "
                f"has {tuple(old.shape)}. Use rope_type='ntk'."
            )


def _validate(model: PreTrainedModel) -> None:
    """Check a model's config by its own rules, as it is checked when it is read from a file."""
    for config in (model.config.get_text_config(), model.config):
        config.validate()


def _is_valid(model: PreTrainedModel) -> bool:
    try:
        _validate(model)
    except StrictDataclassError:
        return False
    return True

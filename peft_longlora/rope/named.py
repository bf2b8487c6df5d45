"""The rope_parameters that the name of a scaling ("yarn", "linear", "ntk" ...) gives for a model and a window."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from peft_longlora.architecture import find_rotary_modules
from peft_longlora.rope.parameters import PROPORTIONAL, base_rope, full_type, keeps_length


def refuse_scaled(config: PreTrainedConfig) -> None:
    """Refuse a base whose RoPE is scaled: two scalings cannot be combined.

    Raises: ValueError.
    """
    rope = base_rope(config)
    is_plain = rope.get("rope_type", "default") == "default"
    if not is_plain and not (rope["rope_type"] == PROPORTIONAL and rope.get("factor", 1.0) == 1.0):
        raise ValueError(
            f"The base's RoPE is scaled already ({rope}), and two scalings cannot be combined. Give the "
            f"complete new rope_parameters in transformers' format (for example {{**base, 'factor': ...}})."
        )


def scaled_parameters(model: PreTrainedModel, context_length: int, rope_type: str) -> tuple[dict[str, Any], int]:
    """The new entries of rope_parameters, and the max_position_embeddings that belongs to them."""
    config = model.config.get_text_config()
    window = config.max_position_embeddings
    factor = context_length / window
    if base_rope(config).get("rope_type") == PROPORTIONAL:
        return _proportional(model, factor, rope_type), context_length
    if rope_type == "dynamic":
        _check_rotating(rope_type, 2 * _frequencies(model).numel())
    if rope_type == "linear" or rope_type == "dynamic":
        return {"rope_type": rope_type, "factor": factor}, window if keeps_length(config, rope_type) else context_length
    if rope_type == "ntk":
        dim = 2 * _frequencies(model).numel()
        return {"rope_type": "default", "rope_theta": _raised_theta(config, factor, dim, dim)}, context_length
    new = {"rope_type": rope_type, "factor": factor, "original_max_position_embeddings": window}
    if rope_type == "llama3":  # the band edges that Llama 3.1 was released with
        new |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return new, context_length


def _proportional(model: PreTrainedModel, factor: float, rope_type: str) -> dict[str, Any]:
    """The new entries where the base's own RoPE is "proportional": the last frequencies of a head are 0.

    Raises: ValueError: a rope_type that transformers cannot express with it.
    """
    if rope_type == "linear":
        return {"rope_type": PROPORTIONAL, "factor": factor}
    if rope_type == "ntk":
        frequencies, config = _frequencies(model), model.config.get_text_config()
        theta = _raised_theta(config, factor, 2 * frequencies.numel(), 2 * int(frequencies.count_nonzero()))
        return {"rope_type": PROPORTIONAL, "rope_theta": theta}
    raise ValueError(
        f"rope_type={rope_type!r} cannot be combined with the base's own rope_type={PROPORTIONAL!r}, in which only a "
        f"part of each head rotates. Use rope_type='linear' or rope_type='ntk', which keep that part."
    )


def _frequencies(model: PreTrainedModel) -> torch.Tensor:
    """The inverse frequencies of full attention."""
    buffers = dict(find_rotary_modules(model)[0].named_buffers())
    kind = full_type(model.config.get_text_config().rope_parameters)
    return buffers[name] if (name := f"{kind}_inv_freq") in buffers else buffers["inv_freq"]


def _raised_theta(config: PreTrainedConfig, factor: float, dim: int, rotating: int) -> float:
    """Theta, raised so that the slowest frequency becomes slower by a factor.

    Args:
        dim: numbers of a head over which frequencies are spread. rotating: those of them that rotate.

    Raises: ValueError: there is only one frequency.
    """
    _check_rotating("ntk", rotating)
    return base_rope(config)["rope_theta"] * factor ** (dim / (rotating - 2))


def _check_rotating(rope_type: str, rotating: int) -> None:
    """Raises: ValueError: there is only one frequency."""
    if rotating <= 2:
        raise ValueError(
            f"rope_type={rope_type!r} raises theta by factor ** (d / (d - 2)), and only d={rotating} numbers of each "
            f"head rotate in this model. Use another rope_type, such as 'linear'."
        )

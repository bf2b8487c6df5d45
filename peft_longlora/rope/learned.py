"""RoPE with a trained factor for each frequency, which transformers' "longrope" expresses.

A base's rotary module computes under no_grad. `learn` makes a module of a class mixed from its own, whose frequencies
are a function of a parameter; the rest of the computation stays transformers' own. Factors start as yarn's.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_longlora.rope.mixing import Mixin, mix, unmix
from peft_longlora.rope.parameters import base_rope, is_nested
from peft_longlora.rope.scale import rewrite_rope
from peft_longlora.rope.state import fresh
from peft_longlora.rope.values import ORIGINAL

STRETCH = "stretch"  # the parameter's name in files: the logarithm of the factors over yarn's
_CURE = "Use rope_type='yarn'."


class LearnedRotary(Mixin):
    """Mixed into the class of a rotary module: frequencies are those of "longrope" with trained factors.

    Attributes:
        stretch: (D / 2,) float32 parameter, 0 at the start.
    """

    stretch: nn.Parameter
    _start: torch.Tensor  # yarn's factors
    _powers: torch.Tensor  # theta ** (2 i / D)

    def factors(self) -> torch.Tensor:
        """(D / 2,) the factors now, float32."""
        return self._constants()[0] * self.stretch.float().exp()

    def _constants(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`_start` and `_powers`: plain attributes do not follow `model.to(...)`, and are not rounded by it."""
        device, here = self.stretch.device, (self._start, self._powers)
        if self._start.device != device:
            here = self._start.to(device), self._powers.to(device)
            if device.type != "meta":  # from there nothing comes back
                self._start, self._powers = here
        return here

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with these frequencies; a gradient reaches the parameter."""
        # As transformers computes "longrope", so that a merged model has the same bits.
        inv_freq = 1.0 / (self.factors() * self._constants()[1])
        kind = self.original_class
        own = kind.__new__(kind)
        own.__dict__.update(self.__dict__)
        own.__dict__["_buffers"] = {**self._buffers, "inv_freq": inv_freq}
        # Without transformers' decorators: no_grad, and updates of frequencies that depend on the row.
        return inspect.unwrap(kind.forward)(own, *args, **kwargs)


def check(model: PreTrainedModel, rotary: list[nn.Module]) -> None:
    """Refuse a model whose RoPE is not one list of frequencies.

    Args:
        rotary: the model's own rotary modules.

    Raises: NotImplementedError.
    """
    config = model.config.get_text_config()
    if len(rotary) != 1 or is_nested(config.rope_parameters) or "inv_freq" not in rotary[0]._buffers:
        raise NotImplementedError(
            f"rope_type='learned': {config.model_type} has {len(rotary)} rotary modules, or a RoPE for each type of "
            f"layer, and 'longrope' is one list of factors for all layers. {_CURE}"
        )


def learn(model: PreTrainedModel, rotary: nn.Module) -> nn.Module:
    """A rotary module that learns.

    Args:
        rotary: the model's own, which yarn has rescaled.

    Raises: NotImplementedError: "longrope" cannot express this RoPE.
    """
    config = model.config.get_text_config()
    module = fresh(rotary, config)
    inv_freq = module._buffers["inv_freq"].float()
    count = len(inv_freq)
    # The caller may make a model without weights (`with torch.device("meta")`), but factors are numbers in a config.
    shape = torch.arange(0, 2 * count, 2, dtype=torch.int64, device="cpu").float() / (2 * count)
    module._powers = base_rope(config)["rope_theta"] ** shape
    module._start = 1.0 / (inv_freq * module._powers)
    mix(module, LearnedRotary)
    merged = copy.deepcopy(config)
    merged.rope_parameters = {**config.rope_parameters, **longrope_of(model, module, module._start)}
    try:
        merged.standardize_rope_params()
        merged.validate_rope()
        expressed = fresh(rotary, merged)._buffers["inv_freq"]
    except Exception as error:
        raise NotImplementedError(
            f"rope_type='learned': {config.model_type} does not take 'longrope', which stores the learned factors "
            f"({type(error).__name__}: {error}). {_CURE}"
        ) from error
    if expressed.shape != inv_freq.shape or not torch.allclose(expressed, inv_freq, rtol=1e-5, atol=0):
        raise NotImplementedError(
            f"rope_type='learned': {config.model_type} computes other frequencies from the factors of 'longrope' than "
            f"from yarn's. {_CURE}"
        )
    device = next(rotary.buffers()).device
    module.to(device)
    module.register_parameter(STRETCH, nn.Parameter(torch.zeros(count, dtype=torch.float32, device=device)))
    return module


def check_checkpoints(model: nn.Module) -> None:
    """Refuse reentrant checkpoints of layers, which all go backward through one graph of the trained frequencies.

    PyTorch would say that a graph is gone.

    Raises: ValueError.
    """
    parts = list(model.modules())
    if not any(isinstance(part, LearnedRotary) and part.stretch.requires_grad for part in parts):
        return
    for part in parts:
        used = getattr(part, "gradient_checkpointing", False) and getattr(part, "_gradient_checkpointing_func", None)
        if used and getattr(used, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "rope_type='learned' cannot be trained with gradient checkpointing that is reentrant, because each "
                "layer would go backward through RoPE's frequencies by itself. Use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, which is transformers' default."
            )


def longrope_of(model: PreTrainedModel, module: LearnedRotary, factors: torch.Tensor) -> dict[str, Any]:
    """The rope_parameters of "longrope" that compute what a learned module computes with these factors.

    Short and long rows have the same factors, so rows of any length have the same frequencies.
    """
    yarn, numbers = base_rope(model.config.get_text_config()), factors.tolist()
    return {
        "rope_type": "longrope",
        "factor": yarn["factor"],
        ORIGINAL: yarn[ORIGINAL],
        "attention_factor": module.attention_scaling,
        "short_factor": numbers,
        "long_factor": numbers,
    }


@torch.no_grad()
def settle(model: PreTrainedModel, module: LearnedRotary) -> None:
    """Make the module, which a merge has put into the model, a plain one, and write its factors into the config."""
    new = longrope_of(model, module, module.factors())
    unmix(module)
    for name in (STRETCH, "_start", "_powers"):
        delattr(module, name)
    module.config = model.config.get_text_config()
    rewrite_rope(model, new)

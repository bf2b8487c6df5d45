"""What a user would pick instead, for benchmarks/training.py: each way as its own library's pages describe it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

NAMES = (
    "transformers, all blocks",
    "transformers, every 2nd block",
    "transformers, offloaded",
    "TRL, offloaded",
)


def apply(name: str, model: nn.Module) -> AbstractContextManager:
    """Switch a way on; returns what the forward runs in.

    Raises: ImportError: the library is not installed, or too old.
    """
    base, options = model.get_base_model(), {"use_reentrant": False}
    if name.endswith("offloaded") and model.device.type != "cuda":
        raise ImportError("needs a GPU")
    if name == "TRL, offloaded":  # SFTConfig(activation_offloading=True, gradient_checkpointing=True)
        from trl.models.activation_offloading import get_act_offloading_ctx_manager

        _enable(base, options)
        return get_act_offloading_ctx_manager(model)
    more = {NAMES[0]: {}, NAMES[1]: {"every_n_layers": 2}, NAMES[2]: {"offload": True}}[name]
    if more and not hasattr(base, "activation_checkpointing_enable"):
        raise ImportError("needs transformers 5.24")
    _enable(base, options, **more)
    return nullcontext()


def _enable(base: nn.Module, options: dict, **more: object) -> None:
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable(options, **more)

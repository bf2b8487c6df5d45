"""Initialisations of LoRA that take a part out of the base's weights, and whether they take the same part again.

Whoever loads such an adapter starts from the untouched base, and PEFT takes the part out once more. `pissa`, `olora`
and `loftq` compute the same part of the same weights. `pissa_niter_N` and `lora_ga` draw random numbers, and
`lora_ga` and `corda` need what a preprocessing left on the layers. (`eva`, `orthogonal`, `mica` and `gaussian` change
no weight of the base: what they draw is in the adapter's file.)
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_CURE = (
    "merge it (merge_and_unload), or save it as a plain LoRA (path_initial_model_for_weight_conversion of "
    "save_pretrained)"
)


def changes_base(init: Any) -> bool:
    """Whether an initialisation changes the base's own weights."""
    return str(init).lower().startswith(CHANGES_BASE)


def why_not_again(init: Any, model: nn.Module | None = None) -> str:
    """Why an initialisation does not take the same part out of the base a second time; "" if it does.

    Args:
        model: where corda finds its preprocessing, if it is there.
    """
    name = str(init).lower()
    if name.startswith("pissa_niter"):
        return "takes a part out of the base's weights that it finds with random numbers"
    if name == "lora_ga":
        return "takes a part out of the base's weights that it finds with random numbers in the gradients of some data"
    if name == "corda" and not (model and any(hasattr(module, "eigens") for module in model.modules())):
        return "takes a part out of the base's weights that it finds in what preprocess_corda computed of some data"
    return ""


def warning_of(init: Any) -> str:
    """What to say when an adapter with such an initialisation is made; "" if nothing."""
    if not (why := why_not_again(init)):
        return ""
    instead = ", or use init_lora_weights='pissa', which needs no random numbers" * str(init).startswith("pissa")
    return (
        f"init_lora_weights={init!r} {why}. A saved adapter cannot be loaded, and a training not resumed in another "
        f"process: the part would be another one. Before this process ends, {_CURE}{instead}."
    )


def check_init(init: Any, model: nn.Module | None, place: str | os.PathLike) -> None:
    """Refuse to load an adapter whose weights belong to a base that cannot be computed again.

    Raises: ValueError.
    """
    if why := why_not_again(init, model):
        raise ValueError(
            f"The adapter in {place} was trained with init_lora_weights={init!r}, which {why}. That part cannot be "
            f"computed again, so the adapter would compute something else on this base. In the process "
            f"that trains it, {_CURE}."
        )

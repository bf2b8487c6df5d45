"""Memory that PyTorch's allocator loses between tensors, and the setting that avoids most of it.

Blocks of a long step are gigabytes, and the optimiser's states are made in the holes that the first step leaves. In
24 GiB an 8B step of 131,072 tokens lost 1.9 GiB to such holes and failed; with segments that grow it fits. PyTorch
reads the setting when the GPU is first used. Called by `fit` and by `longlora train`.
"""

from __future__ import annotations

import os

SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def expand_segments() -> None:
    """Let the allocator's segments grow in this process, unless its settings are there already.

    Call it before the GPU is used. Source: PyTorch's notes on CUDA semantics, "Optimizing memory usage".
    """
    if not any(os.environ.get(name) for name in SETTINGS):
        os.environ[SETTINGS[0]] = EXPANDABLE


def advice() -> str:
    """What to set, if segments cannot grow; otherwise ""."""
    if any(EXPANDABLE in os.environ.get(name, "") for name in SETTINGS):
        return ""
    return (
        f"If the step runs out of memory all the same, while gigabytes are reserved but unallocated, set "
        f"{SETTINGS[0]}={EXPANDABLE} before the GPU is used."
    )

"""What releases of the dependencies call differently: the tests run on the lowest and on the newest."""

from importlib.metadata import version

import pytest
from packaging.version import Version
from torch import nn
from transformers import LlamaForCausalLM
from transformers.integrations import peft

from peft_longlora.architecture import cache_name

CACHE = cache_name(LlamaForCausalLM)

# transformers 5.24 wants peft 0.22 for its own `add_adapter`, `load_adapter` and the rest of `PeftAdapterMixin`.
has_own_adapters = Version(version("peft")) >= Version(peft.MIN_PEFT_VERSION)
own_adapters = pytest.mark.skipif(
    not has_own_adapters, reason=f"transformers' own adapters need peft {peft.MIN_PEFT_VERSION}"
)


def checkpoint_activations(model: nn.Module, use_reentrant: bool | None = None) -> None:
    """Layers forget their activations, and compute them again in the backward."""
    kwargs = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # since transformers 5.24
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

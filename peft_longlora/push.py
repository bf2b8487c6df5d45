"""`push_to_hub` of a model with a LongLoRA adapter pushes our card, with nothing for the user to say.

transformers' own writes a README of its own after saving and just before the upload, and asks nobody
(PushToHubMixin.push_to_hub in its utils/hub.py). So the one object that has the adapter, no class, gets a method.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from peft_longlora.config import LongLoraConfig


def push_our_card(tuner: nn.Module) -> None:
    """Give whoever holds the adapter a `push_to_hub` that brings its card.

    That is the base model under transformers' own `add_adapter`. Otherwise it is the `PeftModel` that is about to take
    the tuner as a submodule, which torch tells those who ask.
    """
    if getattr(tuner.model, "_hf_peft_config_loaded", False):
        _take_over(tuner.model)
    else:
        _ask_torch()


@cache  # asked once and for good: torch.compile takes ill to a change while it is at work
def _ask_torch() -> None:
    register_module_module_registration_hook(_meet)


def _meet(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    if isinstance(owner, PeftModel) and any(isinstance(x, LongLoraConfig) for x in _configs(module).values()):
        _take_over(owner)


def _configs(model: nn.Module | None) -> dict[str, Any]:
    return getattr(model, "peft_config", None) or {}


def _take_over(model: nn.Module) -> None:
    model.push_to_hub = partial(_push, model)  # a partial, which deepcopy and pickle bind to the copy


def _push(model: nn.Module, repo_id: str, **kwargs: Any) -> CommitInfo | str:
    if any(isinstance(config, LongLoraConfig) for config in _configs(model).values()):
        from peft_longlora.hub import push_adapter  # not at the top: it brings the Trainer along

        return push_adapter(model, repo_id, **kwargs)
    return type(model).push_to_hub(model, repo_id, **kwargs)  # the adapter was deleted

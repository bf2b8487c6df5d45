"""`push_to_hub` of a model with a LongLoRA adapter, and of a Trainer of it, push our card with nothing said.

transformers' own push of a model writes a README of its own after saving and just before the upload, and asks nobody
(PushToHubMixin.push_to_hub in its utils/hub.py); its Trainer drafts one, and where our README stood it asks the model
to complete it (Trainer.create_model_card). So the one object that has the adapter, no class, gets these two methods.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.state import AdapterState


def push_our_card(tuner: nn.Module) -> None:
    """Give whoever holds the adapter a `push_to_hub` and a `create_or_update_model_card` that bring its card.

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
    if isinstance(owner, PeftModel) and _has_ours(module):
        _take_over(owner)
        if (state := AdapterState.on(module.model)) is not None:
            state.is_in_peft_model = True


def _take_over(model: nn.Module) -> None:
    # partials, which deepcopy and pickle bind to the copy
    model.push_to_hub = partial(_push, model)
    model.create_or_update_model_card = partial(_update_card, model)


def _has_ours(model: nn.Module | None) -> bool:
    return any(isinstance(config, LongLoraConfig) for config in (getattr(model, "peft_config", None) or {}).values())


def _push(model: nn.Module, repo_id: str, **kwargs: Any) -> CommitInfo | str:
    if _has_ours(model):
        from peft_longlora.hub.trainers import push_adapter  # not at the top: it brings the Trainer along

        return push_adapter(model, repo_id, **kwargs)
    return type(model).push_to_hub(model, repo_id, **kwargs)  # the adapter was deleted


def _update_card(model: nn.Module, output_dir: str) -> None:
    if _has_ours(model):
        from peft_longlora.hub.trainers import update_card

        update_card(model, output_dir)
    elif isinstance(model, PeftModel):  # the adapter was deleted; transformers' models have no such method
        type(model).create_or_update_model_card(model, output_dir)

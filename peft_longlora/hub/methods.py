"""The methods that a model with our adapter gets: `push_to_hub`, `create_or_update_model_card`, `load_adapter`.

transformers' `push_to_hub` always replaces the README after saving and just before the upload
(PushToHubMixin.push_to_hub in its utils/hub.py). Its Trainer drafts a README, and then asks the model to complete it
(Trainer.create_model_card). So the object that has the adapter gets its own versions of these methods; no class is
changed.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from peft_longlora.adapter.again import check_again
from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import read_config
from peft_longlora.hub.base import warn_of_folder
from peft_longlora.hub.card import try_card
from peft_longlora.hub.push import adapters_of, push_adapter, with_base_license
from peft_longlora.hub.readme import README, is_trainers_draft


def give_methods(tuner: nn.Module) -> Callable[[], None] | None:
    """Give the model that holds the adapter a `push_to_hub` and a `create_or_update_model_card` with our card.

    With transformers' own `add_adapter` this is the base model. Otherwise it is the `PeftModel` that takes the tuner as
    a submodule in its next step. It passes itself to no function, and only torch notices the new submodule; so a torch
    hook finds it, until the caller says that the step is done.

    Returns: a function to call when the step is done, or None.
    """
    if getattr(tuner.model, "_hf_peft_config_loaded", False):
        _take_over(tuner.model)
        return None
    wanted = weakref.ref(tuner)

    def meet(owner: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(owner, PeftModel) and module is not None and module is wanted():
            _take_over(owner)

    handle = register_module_module_registration_hook(meet)
    weakref.finalize(tuner, handle.remove)  # if no PeftModel takes it (inject_adapter_in_model)
    return handle.remove


def _take_over(model: nn.Module) -> None:
    # partials, because deepcopy and pickle bind them to the copy
    if isinstance(model, PeftModel):
        model.load_adapter = partial(_load_adapter, model)
    model.push_to_hub = partial(_push, model)
    model.create_or_update_model_card = partial(_update_card, model)


def _has_ours(model: nn.Module) -> bool:
    return any(isinstance(config, LongLoraConfig) for config in (getattr(model, "peft_config", None) or {}).values())


def _push(model: nn.Module, repo_id: str, *, max_shard_size: int | str | None = None, **kwargs: Any) -> CommitInfo:
    if _has_ours(model):
        return push_adapter(model, repo_id, **kwargs)  # adapters are one file
    kwargs |= {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    return type(model).push_to_hub(model, repo_id, **kwargs)  # the adapter was deleted


def _update_card(model: nn.Module, output_dir: str | os.PathLike) -> None:
    """Write our card instead of PEFT's lines in a draft.

    PEFT calls it when a save begins. Each adapter's config writes its card when it is saved, so this function only
    writes the card of the parent folder, if all adapters have their own folders. transformers' Trainer calls it after
    it has drafted a card and before it pushes it.
    """
    if not _has_ours(model):  # the adapter was deleted
        if isinstance(model, PeftModel):  # transformers' models have no such method
            type(model).create_or_update_model_card(model, output_dir)
        return
    configs = adapters_of(model)
    name = "default" if "default" in configs else next(iter(configs))
    is_above = isinstance(model, PeftModel) and name != "default"
    is_draft = is_trainers_draft(Path(output_dir, README))
    if is_above or is_draft:
        config = copy.copy(configs[name])
        if is_draft:
            warn_of_folder(config)
            config.card = with_base_license(config, None)
        try_card(config, output_dir, subfolder=name if is_above else None)


def _load_adapter(model: PeftModel, model_id: str, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter. If the name is taken, its config is checked first, because PEFT does not read it then."""
    options = model._split_kwargs(kwargs)[0]
    config = read_config(model_id, **options)
    if isinstance(config, LongLoraConfig) and isinstance(model.peft_config.get(adapter_name), LongLoraConfig):
        check_again(adapter_name, LongLoraConfig.from_pretrained(model_id, **options), model.base_model, str(model_id))
    return type(model).load_adapter(model, model_id, adapter_name, *args, **kwargs)

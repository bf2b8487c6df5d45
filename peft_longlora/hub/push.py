"""An adapter and its card on their way to the Hub: `push_adapter`, `push_card`, and `push_to_hub` of a model.

transformers' own `push_to_hub` writes a README of its own after saving and just before the upload, and asks nobody
(PushToHubMixin.push_to_hub in its utils/hub.py); its Trainer drafts one, and where our README stood it asks the model
to complete it (Trainer.create_model_card). So the one object that has the adapter, no class, gets these two methods.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import hub_id
from peft_longlora.hub.card import CardOptions, as_list, try_card, write_card
from peft_longlora.hub.readme import README, is_trainers_draft
from peft_longlora.hub.results import RESULTS


def push_adapter(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = "Upload adapter",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Push an adapter and its card in one commit, so that no card stands there before its weights do.

    The arguments are those of `PeftModel.push_to_hub`. A text that people wrote into the repository's README stays.

    Raises:
        ValueError: the model has no LongLoRA adapter.
        LocalTokenNotFoundError: no token is given or stored; the message says how to get one.
        HfHubHTTPError: the Hub's answer; nothing is committed then, and the same call again completes the push.
    """
    api, configs = _writing_api(token), adapters_of(model)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        has_folders = isinstance(model, PeftModel)  # one for each adapter of another name than "default"
        for name in configs:
            path = Path(folder, name) if has_folders and name != "default" else Path(folder)
            _download_readme(api, repo_id, revision, path.relative_to(folder).as_posix(), path)
        if has_folders and "default" not in configs:
            _download_readme(api, repo_id, revision, ".", Path(folder))
        with _on_the_hub(configs, repo_id, api, tags, has_folders):
            model.save_pretrained(folder)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def push_card(
    repo_id: str,
    *,
    template: str | os.PathLike | None = None,
    license: str | None = None,
    datasets: str | Iterable[str] | None = None,
    language: str | Iterable[str] | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Write the card of an adapter that is on the Hub already, from its own adapter_config.json and results.json.

    Args: as those of `use_longlora_card`.

    Raises:
        ValueError: the repository holds no LongLoRA adapter, or its README or results.json cannot be read.
        HfHubHTTPError: the Hub's answer.
    """
    api = _writing_api(token)
    names = api.list_repo_files(repo_id, revision=revision)
    if CONFIG_NAME not in names:
        raise ValueError(
            f"{repo_id} holds no {CONFIG_NAME} but {', '.join(sorted(names)[:5]) or 'nothing'}, so it is no adapter. "
            f"Push one there first: model.push_to_hub({repo_id!r})."
        )
    with TemporaryDirectory() as folder:
        wanted = [n for n in names if n in (CONFIG_NAME, README, RESULTS) or (n.endswith(".png") and "/" not in n)]
        for name in wanted:
            api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)
        config = PeftConfig.from_pretrained(folder)
        if not isinstance(config, LongLoraConfig):
            raise ValueError(f"{repo_id} is an adapter of type {config.peft_type}; this card is for LONGLORA alone.")
        config.card = CardOptions(template, license, as_list(datasets), as_list(language), adapter=repo_id)
        config.card = with_base_license(config, api.token)
        path = write_card(config, folder)
        return api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=path,
            path_in_repo=README,
            commit_message="Update the adapter's card",
            revision=revision,
        )


def update_card(model: nn.Module, output_dir: str | os.PathLike) -> None:
    """Stands in for PEFT's `create_or_update_model_card`: our card, not PEFT's lines in a draft.

    PEFT calls it when a save begins. The save of each adapter's config ends with its card, so there is nothing to do
    but for the folder above adapters that all have folders of their own. transformers' Trainer calls it after it has
    drafted a card that it is about to push.
    """
    configs = adapters_of(model)
    name = "default" if "default" in configs else next(iter(configs))
    is_above = isinstance(model, PeftModel) and name != "default"
    is_draft = is_trainers_draft(Path(output_dir, README))
    if is_above or is_draft:
        config = copy.copy(configs[name])
        config.card = with_base_license(config, None) if is_draft else config.card
        try_card(config, output_dir, subfolder=name if is_above else None)


def adapters_of(model: nn.Module) -> dict[str, LongLoraConfig]:
    """The configs of a model's LongLoRA adapters, by name.

    Raises: ValueError: it has none.
    """
    configs = getattr(model, "peft_config", None) or {}
    found = {name: config for name, config in configs.items() if isinstance(config, LongLoraConfig)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no LongLoRA adapter. Add one with get_peft_model(model, LongLoraConfig(...)), "
            f"or call its own push_to_hub."
        )
    return found


def with_base_license(config: LongLoraConfig, token: bool | str | None) -> CardOptions:
    """What a config's card says, with what only the Hub can tell: the base's licence, if none was given."""
    options, base = CardOptions.of(config), hub_id(config.base_model_name_or_path)
    return replace(options, base_license=_license_of(base, token) if base and not options.license else None)


@lru_cache
def _license_of(repo_id: str, token: bool | str | None) -> str | None:
    try:
        data = HfApi(token=token).model_info(repo_id).card_data
    except Exception:  # of the Hub, of the network, of httpx or its successor: the card says that none is stated
        return None
    return data.get("license") if data else None


def _writing_api(token: bool | str | None) -> HfApi:
    """An API that asks for a token before it does anything, where None would let it try without."""
    return HfApi(token=True if token is None else token)


@contextmanager
def _on_the_hub(
    configs: dict[str, LongLoraConfig], repo_id: str, api: HfApi, tags: list[str] | None, has_folders: bool
) -> Iterator[None]:
    """Within the block, cards that are saved are those of adapters in a repository."""
    before = {name: config.card for name, config in configs.items()}
    try:
        for name, config in configs.items():
            options = with_base_license(config, api.token)
            subfolder = name if has_folders and name != "default" else None
            tags_of_all = (*options.tags, *(as_list(tags) or ()))
            config.card = replace(options, adapter=repo_id, subfolder=subfolder, tags=tags_of_all)
        yield
    finally:
        for name, config in configs.items():
            config.card = before[name]


def _download_readme(api: HfApi, repo_id: str, revision: str | None, subfolder: str, folder: Path) -> None:
    """Put a README of the repository, if there is one, where the new one will be written."""
    name = README if subfolder == "." else f"{subfolder}/{README}"
    with TemporaryDirectory() as download:
        try:
            path = api.hf_hub_download(repo_id, name, revision=revision, local_dir=download)
        except EntryNotFoundError:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / README).write_bytes(Path(path).read_bytes())


# -- push_to_hub of a model --------------------------------------------------------------------------------------------


def give_methods(tuner: nn.Module) -> Callable[[], None] | None:
    """Give whoever holds the adapter a `push_to_hub` and a `create_or_update_model_card` that bring its card.

    That is the base model under transformers' own `add_adapter`. Otherwise it is the `PeftModel` that takes the tuner
    as a submodule. It does so as its next step, tells nobody but torch, and is no argument of anything it calls; so
    torch is asked, until the caller says that the step is done.

    Returns: to be called then, or None.
    """
    if getattr(tuner.model, "_hf_peft_config_loaded", False):
        _take_over(tuner.model)
        return None
    wanted = weakref.ref(tuner)

    def meet(owner: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(owner, PeftModel) and module is not None and module is wanted():
            _take_over(owner)

    handle = register_module_module_registration_hook(meet)
    weakref.finalize(tuner, handle.remove)  # where no PeftModel takes it (inject_adapter_in_model)
    return handle.remove


def _take_over(model: nn.Module) -> None:
    # partials, which deepcopy and pickle bind to the copy
    model.push_to_hub = partial(_push, model)
    model.create_or_update_model_card = partial(_update_card, model)


def _has_ours(model: nn.Module) -> bool:
    return any(isinstance(config, LongLoraConfig) for config in (getattr(model, "peft_config", None) or {}).values())


def _push(model: nn.Module, repo_id: str, *, max_shard_size: int | str | None = None, **kwargs: Any) -> CommitInfo:
    if _has_ours(model):
        return push_adapter(model, repo_id, **kwargs)  # adapters are one file
    kwargs |= {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    return type(model).push_to_hub(model, repo_id, **kwargs)  # the adapter was deleted


def _update_card(model: nn.Module, output_dir: str) -> None:
    if _has_ours(model):
        update_card(model, output_dir)
    elif isinstance(model, PeftModel):  # the adapter was deleted; transformers' models have no such method
        type(model).create_or_update_model_card(model, output_dir)

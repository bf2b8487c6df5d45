"""Pushes an adapter and its card to the Hub: `push_adapter`, and `push_card` for an adapter that is there already."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import hub_id, read_config
from peft_longlora.hub.base import check_base_id, naming_bases
from peft_longlora.hub.card import CardOptions, as_list, write_card
from peft_longlora.hub.draft import Remote, begin_draft, complete_snapshot
from peft_longlora.hub.readme import README


def push_adapter(
    model: nn.Module,
    repo_id: str,
    *,
    base: str | None = None,
    commit_message: str | None = "Upload adapter",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Push an adapter and its card in one commit, so that a card never appears without its weights.

    `PeftModel.push_to_hub` does the same. Text that people wrote into the README, on the Hub or beside the adapter on
    the disk, is kept. If the adapter was loaded from, or last saved in, a folder with results and plots and has not
    changed since, they are pushed with it.

    Args:
        model: with a LongLoRA adapter; `get_peft_model`'s, or transformers' own after `add_adapter`.
        repo_id: "owner/name"; made if it is not there.
        base: the base's id on the Hub, for a base that was loaded from a folder. None: the one that the repository
            names already; if there is none, a warning says that nobody else can load the adapter.
        commit_message: the first line of the commit.
        commit_description: what follows it.
        private: make a new repository private. None: what the owner's settings say.
        token: of the Hub. None: the one that is stored.
        revision: the branch to push to; made if it is not there. None: main.
        create_pr: open a pull request instead.
        tags: further tags on the card.

    Returns:
        The commit.

    Raises:
        ValueError: the model has no LongLoRA adapter, or the base is no id on the Hub.
        LocalTokenNotFoundError: no token is given or stored; the message says how to get one.
        HfHubHTTPError: the Hub refused. Nothing is committed then; repeat the same call to complete the push.
    """
    api, configs = writing_api(token), adapters_of(model)
    check_base_id(base)
    remote = Remote.create(api, repo_id, revision, private)
    with TemporaryDirectory() as place:
        has_folders = isinstance(model, PeftModel)  # one folder for each adapter that is not named "default"
        folders = {f"{name}/" if has_folders and name != "default" else "": config for name, config in configs.items()}
        if "" not in folders:
            begin_draft(remote, "", None, Path(place))
        for subfolder, config in folders.items():
            source = Path(config.folder) if config.folder else None
            if source is not None:
                complete_snapshot(api, source)
            begin_draft(remote, subfolder, source, Path(place, subfolder))
        named = naming_bases(configs.values(), base, remote, Path(place))
        with named, _on_the_hub(configs, remote.repo_id, api, tags, has_folders):
            model.save_pretrained(place)
        return api.upload_folder(
            repo_id=remote.repo_id,
            folder_path=place,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=[name for subfolder in folders for name in remote.gone(subfolder, Path(place, subfolder))],
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
    """Write the card of an adapter that is already on the Hub, from its adapter_config.json and results.json.

    Args:
        repo_id: "owner/name".
        template: as in `use_longlora_card`, like the next three.
        license: a licence identifier of the Hub.
        datasets: ids of data sets on the Hub.
        language: codes such as "en".
        token: of the Hub. None: the one that is stored.
        revision: the branch. None: main.

    Returns:
        The commit.

    Raises:
        ValueError: the repository holds no LongLoRA adapter, or its README or results.json cannot be read.
        HfHubHTTPError: the Hub refused.
    """
    api = writing_api(token)
    names = api.list_repo_files(repo_id, revision=revision)
    if CONFIG_NAME not in names:
        raise ValueError(
            f"{repo_id} holds no {CONFIG_NAME} but {', '.join(sorted(names)[:5]) or 'nothing'}, so it is not an "
            f"adapter. Push one there first: model.push_to_hub({repo_id!r})."
        )
    with TemporaryDirectory() as folder:
        remote = Remote(api, repo_id, revision, names)
        remote.download("", Path(folder))
        api.hf_hub_download(repo_id, CONFIG_NAME, revision=revision, local_dir=folder)
        config = read_config(folder)
        if not isinstance(config, LongLoraConfig):
            raise ValueError(
                f"{repo_id} is an adapter of type {config.peft_type}, and this card is for LONGLORA alone. Write its "
                f"README by hand."
            )
        config.card = CardOptions(
            template=template,
            license=license,
            datasets=as_list(datasets),
            language=as_list(language),
            adapter=repo_id,
        )
        config.card = with_base_license(config, api.token)
        (weights,) = api.get_paths_info(repo_id, [SAFETENSORS_WEIGHTS_NAME], revision=revision) or [None]
        path = write_card(config, folder, weights=weights.lfs.sha256 if weights and weights.lfs else None)
        return api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=path,
            path_in_repo=README,
            commit_message="Update the adapter's card",
            revision=revision,
        )


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
    """The options of a config's card; if no licence was given, with the base's licence from the Hub."""
    options, base = CardOptions.of(config), hub_id(config.base_model_name_or_path)
    return replace(options, base_license=_license_of(base, token) if base and not options.license else None)


@lru_cache
def _license_of(repo_id: str, token: bool | str | None) -> str | None:
    try:
        data = HfApi(token=token).model_info(repo_id).card_data
    except Exception:  # any error of the Hub or the network: the card then states no licence
        return None
    return data.get("license") if data else None


def writing_api(token: bool | str | None) -> HfApi:
    """An API that requires a token before it does anything. (With None it would try without a token.)"""
    return HfApi(token=True if token is None else token)


@contextmanager
def _on_the_hub(
    configs: dict[str, LongLoraConfig], repo_id: str, api: HfApi, tags: list[str] | None, has_folders: bool
) -> Iterator[None]:
    """Within the block, saved cards describe adapters in this repository."""
    before = {name: (config.card, config.folder) for name, config in configs.items()}
    try:
        for name, config in configs.items():
            options = with_base_license(config, api.token)
            subfolder = name if has_folders and name != "default" else None
            tags_of_all = (*options.tags, *(as_list(tags) or ()))
            config.card = replace(options, adapter=repo_id, subfolder=subfolder, tags=tags_of_all)
        yield
    finally:
        for name, config in configs.items():
            config.card, config.folder = before[name]

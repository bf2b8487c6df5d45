"""The way of an adapter's card to the Hub. What it says is `card`'s business.

`model.save_pretrained` leaves our card by itself, `model.push_to_hub` is `push_adapter`, and transformers' Trainer ends
its card with `update_card` (see `push`). TRL's trainers draft a card last and ask neither model nor config:
`use_longlora_card`, said once, makes them push ours.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import hub_id
from peft_longlora.hub.card import README, CardOptions, try_card, write_card
from peft_longlora.hub.results import RESULTS

logger = logging.get_logger(__name__)


def use_longlora_card(
    target: nn.Module | Trainer,
    *,
    template: str | os.PathLike | None = None,
    license: str | None = None,
    datasets: str | Iterable[str] | None = None,
    language: str | Iterable[str] | None = None,
    tags: str | Iterable[str] | None = None,
    results: str | os.PathLike | None = None,
) -> None:
    """Make every push of a trainer leave a LongLoRA card, and say what the card of an adapter cannot know.

    A model and a `Trainer` of transformers need this only for what it says: they bring our card anyway, though what a
    Trainer pushes before the end names the output folder in its code. TRL's trainers need it: their last push ends with
    a card of TRL's, which `push_card` or the next `model.push_to_hub` replaces. With this line `create_model_card` of
    the trainer is ours, on this one object (no class is touched), and a callback writes the card before each push of a
    checkpoint.

    Args:
        target: a model with a LongLoRA adapter, or a `Trainer` of transformers or TRL that trains one.
        template: a Jinja file instead of the package's templates/adapter_card.md, with the same variables.
        license: an identifier of the Hub's, such as "apache-2.0". None: the base model's, asked for when pushing.
        datasets: ids of data sets on the Hub.
        language: codes such as "en".
        tags: tags beside the card's own.
        results: a folder that `longlora eval` wrote; its results.json and plots go along and are shown.

    Raises:
        ValueError: no LongLoRA adapter in the target, a template that cannot be rendered, or no results there.
    """
    model = target.accelerator.unwrap_model(target.model) if isinstance(target, Trainer) else target
    options = CardOptions(
        template, license, _as_list(datasets), _as_list(language), tuple(_as_list(tags) or ()), results
    )
    for config in _configs(model).values():
        config._card = options
        with TemporaryDirectory() as folder:
            write_card(config, folder)  # a bad template is said now, not after hours of training
    if isinstance(target, Trainer):
        target.create_model_card = partial(_write_trainer_card, target)
        target.add_callback(_CardCallback(target))


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
    max_shard_size: int | str | None = None,
) -> CommitInfo:
    """Push an adapter and its card in one commit, so that no card stands there before its weights do.

    The arguments are those of `PeftModel.push_to_hub`. A text that people wrote into the repository's README stays.

    Raises:
        ValueError: the model has no LongLoRA adapter.
        LocalTokenNotFoundError: no token is given or stored; the message says how to get one.
        HfHubHTTPError: the Hub's answer; nothing is committed then, and the same call again completes the push.
    """
    api, configs = _writing_api(token), _configs(model)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        root = "default" if "default" in configs else next(iter(configs))
        for name, config in configs.items():
            config = _for_push(config, api, tags)
            subfolder = None if name == "default" else name
            if subfolder and Path(folder, name).is_dir():
                write_card(config, Path(folder, name), repo_id, subfolder)
            if name == root:
                _replace_readme(api, repo_id, revision, Path(folder))
                write_card(config, folder, repo_id, subfolder if Path(folder, name).is_dir() else None)
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
        config._card = CardOptions(template, license, _as_list(datasets), _as_list(language))
        path = write_card(_for_push(config, api), folder, repo_id)
        return api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=path,
            path_in_repo=README,
            commit_message="Update the adapter's card",
            revision=revision,
        )


def _writing_api(token: bool | str | None) -> HfApi:
    """An API that asks for a token before it does anything, where None would let it try without."""
    return HfApi(token=True if token is None else token)


class _CardCallback(TrainerCallback):
    """Writes the card before a push of a checkpoint, for which transformers' Trainer writes none."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _write_trainer_card(self.trainer)


def _write_trainer_card(
    trainer: Trainer,
    *,
    license: str | None = None,
    tags: str | list[str] | None = None,
    language: str | None = None,
    dataset: str | list[str] | None = None,
    dataset_name: str | None = None,
    **kwargs: Any,
) -> None:
    """Stands in for a trainer's `create_model_card`, with its keywords: transformers' dataset is TRL's dataset_name."""
    if not trainer.is_world_process_zero():
        return
    config = next(iter(_configs(trainer.accelerator.unwrap_model(trainer.model)).values()))
    options = CardOptions.of(config)
    given = {
        "license": license,
        "language": _as_list(language),
        "datasets": _as_list(dataset or dataset_name),
        "tags": (*options.tags, *(_as_list(tags) or ())),
    }
    config = copy.copy(config)
    config._card = replace(options, **{key: value for key, value in given.items() if value})
    repo_id = trainer.hub_model_id or trainer.args.hub_model_id
    if repo_id:
        config = _for_push(config, HfApi(token=trainer.args.hub_token))
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    write_card(config, trainer.args.output_dir, repo_id)


def update_card(model: nn.Module, output_dir: str | os.PathLike) -> None:
    """Stands in for PEFT's `create_or_update_model_card` (see `push`): our card, not PEFT's lines in a draft.

    `save_pretrained` calls it before it saves, and transformers' Trainer after it drafted a card that it is to push.
    """
    configs = _configs(model)
    name, config = ("default", configs["default"]) if "default" in configs else next(iter(configs.items()))
    if repo_id := _drafted_for(Path(output_dir, README)):
        config = _for_push(config, HfApi())
    try_card(config, output_dir, repo_id, None if name == "default" else name)


def _drafted_for(path: Path) -> str | None:
    """The repository that a Trainer made a moment ago and drafted this card for, if it is one.

    The draft gives its name but not whose it is: it is this user's or of an organisation of theirs. If none has it,
    or several do, the answer is None and the card shows the folder.
    """
    text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    if "generated automatically according to the information the Trainer had" not in text or get_token() is None:
        return None
    name, api = ModelCard(text).data.get("model_name"), HfApi()
    try:
        user = api.whoami()
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs") or ())]
        found = [repo_id for owner in owners if api.repo_exists(repo_id := f"{owner}/{name}")]
    except Exception as error:  # of httpx or httpx2, by the version of huggingface_hub: the Hub is not reached
        logger.warning_once(f"The card in {path.parent} names no repository: {type(error).__name__}: {error}")
        return None
    return found[0] if len(found) == 1 else None


def _configs(model: nn.Module) -> dict[str, LongLoraConfig]:
    configs = getattr(model, "peft_config", None) or {}
    found = {name: config for name, config in configs.items() if isinstance(config, LongLoraConfig)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no LongLoRA adapter. Add one with get_peft_model(model, LongLoraConfig(...)), "
            f"or call its own push_to_hub."
        )
    return found


def _for_push(config: LongLoraConfig, api: HfApi, tags: Iterable[str] | None = None) -> LongLoraConfig:
    """The config with what only the Hub can tell: the base's licence, where none was given."""
    options = CardOptions.of(config)
    base = hub_id(config.base_model_name_or_path)
    base_license = _license_of(base, api.token) if base and not options.license else None
    config = copy.copy(config)
    config._card = replace(options, base_license=base_license, tags=(*options.tags, *(_as_list(tags) or ())))
    return config


@lru_cache
def _license_of(repo_id: str, token: bool | str | None) -> str | None:
    try:
        data = HfApi(token=token).model_info(repo_id).card_data
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None  # the card says that none is stated
    return data.get("license") if data else None


def _replace_readme(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    """Put the repository's README where the new one will be written, or none if it has none."""
    (folder / README).unlink(missing_ok=True)
    with TemporaryDirectory() as download:
        try:
            path = api.hf_hub_download(repo_id, README, revision=revision, local_dir=download)
        except EntryNotFoundError:
            return
        (folder / README).write_bytes(Path(path).read_bytes())


def _as_list(value: str | Iterable[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else list(value) if value else None

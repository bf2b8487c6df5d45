"""`use_longlora_card`: every save and push of a trainer writes our card, with what you know about the data."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_longlora.hub.base import warn_of_folder
from peft_longlora.hub.card import CardOptions, as_list, try_card, write_card
from peft_longlora.hub.push import adapters_of, with_base_license

if TYPE_CHECKING:  # the Trainer imports half of the installed packages
    from transformers import Trainer


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
    """Make every save and push write a LongLoRA card, with facts that an adapter does not know itself.

    Without this call, a model's `save_pretrained` and `push_to_hub` already write our card. transformers' Trainer
    pushes our card too, but the card's code loads the output folder, because the card does not know the repository.
    TRL's trainers end their last push with a card of their own, which `push_card` or the next `model.push_to_hub`
    replaces. After this call the cards of both name the repository, and `create_model_card` of this one trainer writes
    our card (no class is changed).

    Args:
        target: a model with a LongLoRA adapter, or a `Trainer` of transformers or TRL that trains one.
        template: a Jinja file instead of the package's templates/adapter_card.md, with the same variables.
        license: a licence identifier of the Hub, such as "apache-2.0". None: the base model's, looked up when pushing.
        datasets: ids of data sets on the Hub.
        language: codes such as "en".
        tags: further tags.
        results: a folder that `longlora eval` wrote; its results.json and plots are copied and shown.

    Raises:
        ValueError: the target has no LongLoRA adapter, the template cannot be rendered, or the folder has no results.
    """
    trainer = None if isinstance(target, nn.Module) else target
    model = target if trainer is None else _model_of(trainer)
    options = CardOptions(
        template=template,
        license=license,
        datasets=as_list(datasets),
        language=as_list(language),
        tags=tuple(as_list(tags) or ()),
        results=results,
    )
    for config in adapters_of(model).values():
        config.card = options
        with TemporaryDirectory() as folder:
            write_card(config, folder)  # a bad template raises now, not after hours of training
        if trainer is not None:
            config.card = _of_trainer(config, trainer)
    if trainer is not None:
        trainer.create_model_card = partial(_write_trainer_card, trainer)


def _model_of(trainer: Trainer) -> nn.Module:
    return trainer.accelerator.unwrap_model(trainer.model)


def _of_trainer(config: Any, trainer: Trainer) -> CardOptions:
    """The options of the card if the trainer pushes to a repository."""
    if not (repo_id := trainer.hub_model_id or trainer.args.hub_model_id):
        return CardOptions.of(config)
    warn_of_folder(config)
    return replace(with_base_license(config, trainer.args.hub_token), adapter=repo_id)


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
    """Replaces a trainer's `create_model_card`. transformers calls the data sets `dataset`, TRL `dataset_name`."""
    if not trainer.is_world_process_zero():
        return
    config = next(iter(adapters_of(_model_of(trainer)).values()))
    options = config.card = _of_trainer(config, trainer)
    given = {
        "license": license,
        "language": as_list(language),
        "datasets": as_list(dataset or dataset_name),
        "tags": tuple(dict.fromkeys((*options.tags, *(as_list(tags) or ())))),
    }
    config.card = replace(options, **{key: value for key, value in given.items() if value})
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    try_card(config, trainer.args.output_dir)

"""`use_longlora_card`: every save and push of a trainer leaves our card, and says what you know of the data."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_longlora.hub.card import CardOptions, as_list, try_card, write_card
from peft_longlora.hub.push import adapters_of, with_base_license

if TYPE_CHECKING:  # the Trainer brings half of the installed packages along
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
    """Make every save and push leave a LongLoRA card that says what an adapter cannot know of itself.

    Without this line, a model's `save_pretrained` and `push_to_hub` write our card already. The card of a Trainer of
    transformers is ours too, but its code loads the output folder, since nobody tells the card for which repository it
    is. TRL's trainers end their last push with a card of TRL's, which `push_card` or the next `model.push_to_hub`
    replaces. With this line, the cards of both name the repository, and `create_model_card` of this one trainer is
    ours (no class is touched).

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
    trainer = None if isinstance(target, nn.Module) else target
    model = target if trainer is None else _model_of(trainer)
    options = CardOptions(template, license, as_list(datasets), as_list(language), tuple(as_list(tags) or ()), results)
    for config in adapters_of(model).values():
        config.card = options
        with TemporaryDirectory() as folder:
            write_card(config, folder)  # a bad template is said now, not after hours of training
        if trainer is not None:
            config.card = _of_trainer(config, trainer)
    if trainer is not None:
        trainer.create_model_card = partial(_write_trainer_card, trainer)


def _model_of(trainer: Trainer) -> nn.Module:
    return trainer.accelerator.unwrap_model(trainer.model)


def _of_trainer(config: Any, trainer: Trainer) -> CardOptions:
    """What the card says when the trainer has made the repository that it pushes to."""
    if not (repo_id := trainer.hub_model_id or trainer.args.hub_model_id):
        return CardOptions.of(config)
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
    """Stands in for a trainer's `create_model_card`, with its keywords: transformers' dataset is TRL's dataset_name."""
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

"""An adapter's model card: what its README.md says. A text that is there already is the business of `readme`.

Every save of a `LongLoraConfig` calls `write_cards_of_save` (see `register`), so every way of saving an adapter leaves
a card; `push` brings it to the Hub. The text itself is one template, templates/adapter_card.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import hub_id
from peft_longlora.hub.markdown import cell, code, literal
from peft_longlora.hub.readme import README, is_free, read_readme, with_our_part, write_readme
from peft_longlora.hub.results import Row, copy_results, read_results

TEMPLATE = Path(__file__).parent / "templates" / "adapter_card.md"
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CardOptions:
    """What a card says that neither the adapter's config nor its folder tells.

    Attributes:
        template: a Jinja template of one's own, a file. It is given the same variables as templates/adapter_card.md.
        license: an identifier of the Hub's, such as "apache-2.0".
        datasets: ids of data sets on the Hub.
        language: language codes, such as "en".
        tags: more tags than the card's own.
        results: a folder whose results.json and plots are put beside the adapter at every save.
        base_license: the base's licence, for where neither `license` nor the README there names one.
        adapter: what the card's code loads, the id of a repository. None: the folder that the card lies in.
        subfolder: of that repository, where the adapter lies in one.
    """

    template: str | Path | None = None
    license: str | None = None
    datasets: list[str] | None = None
    language: list[str] | None = None
    tags: tuple[str, ...] = ()
    results: str | Path | None = None
    base_license: str | None = None
    adapter: str | None = None
    subfolder: str | None = None

    @classmethod
    def of(cls, config: LongLoraConfig) -> CardOptions:
        """The options that were set for an adapter, or none."""
        return config.card or cls()


def write_card(config: LongLoraConfig, folder: str | os.PathLike, subfolder: str | None = None) -> Path:
    """Write or update README.md in an adapter's folder.

    A README of somebody's own keeps its text and gets our metadata, as PEFT does it. One that a library drafted is
    replaced; in one of ours, what stands between the two marks is.

    Args:
        config: of the adapter.
        folder: of the adapter; a results.json and plots (*.png) that lie there are shown.
        subfolder: of the folder, where the adapter itself lies in one.

    Raises:
        ValueError: the template, the README or results.json cannot be read.
    """
    folder = Path(folder)
    path = folder / README
    options = CardOptions.of(config)
    if options.results:
        copy_results(Path(options.results), folder)
    results, plots = read_results(folder)
    place, subfolder = options.adapter or str(folder), options.subfolder or subfolder
    try:
        card = make_card(config, place, results, plots, old=read_readme(path), subfolder=subfolder)
    except yaml.YAMLError as error:
        raise ValueError(
            f"The metadata at the top of {path} cannot be read: {' '.join(str(error).split())}. Correct it, or delete "
            f"the file."
        ) from error
    write_readme(path, str(card))
    return path


def write_cards_of_save(config: LongLoraConfig, folder: str | os.PathLike) -> None:
    """Write the card of an adapter that was just saved; a card that cannot be written is a warning.

    Of a Trainer's checkpoint, the folder above gets one too, unless a README stands there that is no library's draft:
    that folder is what the Trainer pushes at every save, with TRL's draft in it or with no README at all.

    A Trainer's checkpoint is known by its name, checkpoint-{number}, alone: transformers (5.17 to 5.23) saves the model
    before anything else, training_args.bin included, and pushes before any callback. So a folder of such a name gets a
    card above it whoever saves; name it otherwise where that is not wanted.
    """
    folder = Path(folder)
    try_card(config, folder)
    if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) and is_free(folder.parent / README):
        try_card(config, folder.parent)


def try_card(config: LongLoraConfig, folder: str | os.PathLike, subfolder: str | None = None) -> None:
    """`write_card`, for where hours of training should not end in a README."""
    try:
        write_card(config, folder, subfolder)
    except (OSError, ValueError) as error:
        logger.warning_once(f"The adapter in {folder} is saved, but has no new card. {error}")


def make_card(
    config: LongLoraConfig,
    adapter: str,
    results: list[Row] | None = None,
    plots: list[str] | None = None,
    old: str = "",
    subfolder: str | None = None,
    extra: dict[str, Any] | None = None,
) -> ModelCard:
    """The card of an adapter, with what people wrote into the old one.

    Args:
        config: of the adapter, as it was saved: with base_model_name_or_path and applied_rope_parameters.
        adapter: what the card's code loads: a repository's id or a folder.
        results, plots: as `read_results` returns them.
        old: the text of the README that is there.
        subfolder: of the repository, where the adapter lies in one.
        extra: variables for a template of one's own.

    Raises:
        ValueError: the template cannot be rendered.
        yaml.YAMLError: the old card's metadata cannot be read.
    """
    before = ModelCard(old or "---\n{}\n---\n")
    kept = before.data.to_dict()
    if hub_id(kept.get("base_model")) is None:
        kept.pop("base_model", None)  # PEFT writes folders there, which the Hub refuses
    index = kept.get("model-index")
    if isinstance(index, list) and all(isinstance(entry, dict) and not entry.get("results") for entry in index):
        kept.pop("model-index")  # a Trainer's, without an evaluation
    options = CardOptions.of(config)
    base = hub_id(config.base_model_name_or_path)
    name = Path(adapter).name or "adapter"
    tags = {tag for tag in kept.get("tags") or () if not tag.startswith("base_model:adapter:")}
    tags |= {"longlora", "lora", "peft", "transformers", *options.tags, *(config.model_tags or ())}
    data = {
        **kept,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": sorted(tags | ({f"base_model:adapter:{base}"} if base else set())),
        **({"base_model": base} if base else {}),
        **{key: value for key in ("license", "datasets", "language") if (value := getattr(options, key))},
    }
    if options.base_license:
        data.setdefault("license", options.base_license)
    if results:
        data = {k: v for k, v in data.items() if k != "model-index"}
        # The base's numbers are no claim of this model's, and what a length costs is one of the machine.
        own = [row.eval_result() for row in results if row.variant == "adapter" and row.task != "cost"]
        data |= {"model_name": name, "eval_results": own} if own else {}
    datasets = data.get("datasets") or []
    variables = {
        **_variables(config, adapter, base, name),
        "subfolder_literal": literal(subfolder) if subfolder else None,
        "license": data.get("license"),
        "datasets": [datasets] if isinstance(datasets, str) else datasets,
        "results": results or [],
        "plots": plots or [],
        **(extra or {}),
    }
    card = _render(ModelCardData(**data), options.template, variables)
    text = with_our_part(before.text, card.text)
    if text is None:
        logger.warning(f"The README of {adapter} is not peft-longlora's. Its text stays; its metadata is up to date.")
    card.text = (before.text if text is None else text).rstrip() + "\n"
    return card


def _render(data: ModelCardData, template: str | Path | None, variables: dict[str, Any]) -> ModelCard:
    path = str(template or TEMPLATE)
    try:
        card = ModelCard.from_template(data, template_path=path, **variables)
    except (OSError, jinja2.TemplateError, TypeError, ValueError, yaml.YAMLError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(
            f"template={path!r}{line} gives no card: {type(error).__name__}: {error}. Begin from {TEMPLATE}, which has "
            f"the metadata block and shows all variables."
        ) from error
    if not card.data.tags:
        raise ValueError(
            f"template={path!r} renders no metadata. Begin it with the lines '---', '{{{{ card_data }}}}' and '---'."
        )
    return card


def _variables(config: LongLoraConfig, adapter: str, base: str | None, name: str) -> dict[str, Any]:
    """What a template can use besides the metadata. Text from a config reaches Python code as a literal only."""
    window = config.applied_context_length or config.context_length or config.base_context_length
    rope = config.applied_rope_parameters
    modules = config.target_modules
    return {
        "config": config,
        "name": name,
        "adapter_literal": literal(adapter),
        "base_model": base,
        "base_literal": literal(base),
        "base_window": config.base_context_length,
        "window": window,
        "is_extended": bool(window and config.base_context_length and window > config.base_context_length),
        "rope_json": literal(rope) if rope else None,
        "pattern_text": _pattern_text(config, window),
        "targets": ", ".join(map(code, sorted(modules) if isinstance(modules, set | list) else [modules])),
        "modules_to_save": ", ".join(map(code, config.modules_to_save or ())),
        "cell": cell,
        "code": code,
        "versions": _versions(config),
    }


def _pattern_text(config: LongLoraConfig, window: int | None) -> str:
    if config.attention_pattern == "full":
        return "`full`: dense"
    size = config.applied_group_size or config.group_size
    if size is None and window:  # an adapter of before it was recorded
        size = config.group_size_on(window)
    shift = ", half the heads shifted by half a group" if config.attention_pattern == "s2" else ", no shift"
    groups = f"groups of {size:,} tokens" if size else f"groups of {config.group_size_ratio} of the window"
    dense = f"; dense in layers {', '.join(map(str, config.dense_layers))}" if config.dense_layers else ""
    return f"`{config.attention_pattern}`: {groups}{shift}{dense}"


def _versions(config: LongLoraConfig) -> list[str]:
    lines = [f"PEFT {config.peft_version}"]
    for package in ("peft-longlora", "transformers", "torch"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # used from a source tree
            continue
    return lines


def as_list(value: str | Iterable[str] | None) -> list[str] | None:
    """One text or several, as a list; None if there is none."""
    return [value] if isinstance(value, str) else list(value) if value else None

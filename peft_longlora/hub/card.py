"""An adapter's model card: the content of its README.md. (`readme` handles a README that exists already.)

Every save of a `LongLoraConfig` calls `write_cards_of_save` (see `register`), so every way of saving an adapter writes
a card; `push` brings it to the Hub. The text is one template, templates/adapter_card.md.
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
from huggingface_hub import ModelCard, ModelCardData
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import hub_id
from peft_longlora.hub.markdown import cell, code, literal
from peft_longlora.hub.provenance import carry_results, is_of_other_weights, read_training
from peft_longlora.hub.readme import README, UNREADABLE, check_metadata, is_free, read_readme, tags_of, with_our_part
from peft_longlora.hub.results import RESULTS, Row, copy_results, read_notes, read_results
from peft_longlora.hub.writing import write_whole

TEMPLATE = Path(__file__).parent / "templates" / "adapter_card.md"
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CardOptions:
    """Facts for a card that are neither in the adapter's config nor in its folder.

    Attributes:
        template: your own Jinja template, a file. It gets the same variables as templates/adapter_card.md.
        license: a licence identifier of the Hub, such as "apache-2.0".
        datasets: ids of data sets on the Hub.
        language: language codes, such as "en".
        tags: further tags.
        results: a folder whose results.json and plots are copied beside the adapter at every save.
        base_license: the base's licence, used if neither `license` nor the old README names one.
        adapter: the repository id that the card's code loads. None: the folder of the card.
        subfolder: the adapter's folder in that repository, if it is in one.
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
        """The options that were set for an adapter, or the defaults."""
        return config.card or cls()


def write_card(
    config: LongLoraConfig,
    folder: str | os.PathLike,
    subfolder: str | None = None,
    weights: str | None = None,
) -> Path:
    """Write or update README.md in an adapter's folder.

    A README that a person wrote keeps its text and gets our metadata, as in PEFT. A README that a library drafted is
    replaced. In our own README the part between the two marks is replaced.

    Results come along if the adapter was loaded from, or last saved in, another folder that has them, and its weights
    have not changed since. Results of other weights are shown as such, and are not in the metadata.

    Args:
        config: the adapter's config.
        folder: the adapter's folder; if it has a results.json and plots (*.png), the card shows them.
        subfolder: the adapter's subfolder of that folder, if it is in one.
        weights: the SHA-256 of the adapter's weights file, if it is not in the folder.

    Raises:
        ValueError: the template, the README or results.json cannot be read.
    """
    folder = Path(folder)
    path = folder / README
    options = CardOptions.of(config)
    if options.results:
        copy_results(Path(options.results), folder)
    else:
        carry_results(config.folder, folder)
    results, plots = read_results(folder)
    is_stale = is_of_other_weights(folder, weights)
    if is_stale:
        logger.warning(
            f"The {RESULTS} beside the adapter in {options.adapter or folder} is of other weights than those here. The "
            f"card says so, and its metadata leaves these results out. Measure the adapter: longlora eval --card."
        )
    place, subfolder = options.adapter or str(folder), options.subfolder or subfolder
    check_metadata(old := read_readme(path), path)
    facts = dict(notes=read_notes(folder), training=read_training(folder, weights))
    # In one step: a full disk leaves the old card, and a link into a cache is not followed.
    write_whole(path, str(make_card(config, place, results, plots, old, subfolder, is_stale, **facts)))
    return path


def write_cards_of_save(config: LongLoraConfig, folder: str | os.PathLike) -> None:
    """Write the card of an adapter that was just saved. If it cannot be written, warn.

    For a Trainer's checkpoint the parent folder gets a card too, because the Trainer pushes that folder at every save,
    with TRL's draft in it or without a README. A README that a person wrote there is kept.

    Only its name, checkpoint-{number}, shows that a folder is a Trainer's checkpoint: transformers (5.17 to 5.23) saves
    the model before all other files, training_args.bin included, and pushes before any callback. So every save into a
    folder with such a name writes a card above it. If you do not want this, use another name.
    """
    folder = Path(folder)
    try_card(config, folder)
    if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) and is_free(folder.parent / README):
        try_card(config, folder.parent)


def try_card(config: LongLoraConfig, folder: str | os.PathLike, subfolder: str | None = None) -> None:
    """`write_card`, but an error is only a warning, so that a bad README does not end a training."""
    try:
        write_card(config, folder, subfolder)
    except Exception as error:  # whatever a file holds that a person wrote
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        logger.warning_once(f"The adapter in {folder} is saved, but has no new card. {kind}{error}")


def make_card(
    config: LongLoraConfig,
    adapter: str,
    results: list[Row] | None = None,
    plots: list[str] | None = None,
    old: str = "",
    subfolder: str | None = None,
    is_stale: bool = False,
    extra: dict[str, Any] | None = None,
    notes: list[str] | None = None,
    training: list[str] | None = None,
) -> ModelCard:
    """The card of an adapter; text that people wrote into the old card is kept.

    Args:
        config: the config of a saved adapter, with base_model_name_or_path and applied_rope_parameters.
        adapter: what the card's code loads: a repository's id or a folder.
        results, plots: as `read_results` returns them.
        old: the text of the existing README.
        subfolder: the adapter's folder in the repository, if it is in one.
        is_stale: whether the results are of other weights.
        extra: further variables for a template.
        notes: warnings for readers of the results.
        training: lines about the data and the training.

    Raises:
        ValueError: the template cannot be rendered.
        yaml.YAMLError: the old card's metadata cannot be read.
    """
    before = ModelCard(old or "---\n{}\n---\n")
    kept = before.data.to_dict()
    if hub_id(kept.get("base_model")) is None:
        kept.pop("base_model", None)  # PEFT may write a folder here, which the Hub refuses
    index = kept.get("model-index")
    if isinstance(index, list) and all(isinstance(entry, dict) and not entry.get("results") for entry in index):
        kept.pop("model-index")  # a Trainer wrote it without an evaluation
    options = CardOptions.of(config)
    base = hub_id(config.base_model_name_or_path)
    name = Path(adapter).name or "adapter"
    tags = {tag for tag in tags_of(old) if not tag.startswith("base_model:adapter:")}
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
        # The base's numbers are not results of this model, and costs are results of the machine.
        own = [row.eval_result() for row in results if row.variant == "adapter" and row.task != "cost"]
        data |= {"model_name": name, "eval_results": own} if own and not is_stale else {}
    datasets = data.get("datasets") or []
    variables = {
        **_variables(config, adapter, base, name),
        "subfolder_literal": literal(subfolder) if subfolder else None,
        "license": data.get("license"),
        "datasets": [datasets] if isinstance(datasets, str) else datasets,
        "results": results or [],
        "has_intervals": any(None not in (row.low, row.high) for row in results or ()),
        "lacks_intervals": any(row.units and None in (row.low, row.high) for row in results or ()),
        "is_beyond": any(row.beyond_window for row in results or ()),
        "notes": notes or [],
        "training": training or [],
        "plots": plots or [],
        "is_stale": is_stale,
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
    except (OSError, jinja2.TemplateError, *UNREADABLE) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(
            f"template={path!r}{line} gives no card: {type(error).__name__}: {error}. Start from {TEMPLATE}, which has "
            f"the metadata block and uses all variables."
        ) from error
    if not card.data.tags:
        raise ValueError(
            f"template={path!r} renders no metadata. Start it with the lines '---', '{{{{ card_data }}}}' and '---'."
        )
    return card


def _variables(config: LongLoraConfig, adapter: str, base: str | None, name: str) -> dict[str, Any]:
    """The variables of a template, besides the metadata. Text from a config enters Python code only as a literal."""
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
        "is_learned": config.rope_type == "learned",
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
    if size is None and window:  # the adapter is older than this field
        size = config.group_size_on(window)
    shift = ", half the heads shifted by half a group" if config.attention_pattern == "s2" else ", no shift"
    groups = f"groups of {size:,} tokens" if size else f"groups of {config.group_size_ratio} of the window"
    if config.attention_pattern == "window":
        groups, shift = f"{size // 2:,} tokens back, and the first 128" if size else "half a group back", ""
    elif config.attention_pattern == "adaptive":
        chosen = f"{config.chosen_blocks}" if config.chosen_blocks else "as many as cost what groups cost"
        groups, shift = f"blocks of 128 keys chosen by content ({chosen}) in documents of more than {size:,} tokens", ""
    dense = f"; dense in layers {', '.join(map(str, config.dense_layers))}" if config.dense_layers else ""
    if config.dense_every:
        dense += f"; one training forward in {config.dense_every} dense in every layer"
    if config.skip_positions:
        dense += "; positions skip inside groups (PoSE, arXiv:2309.10400)"
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
    """One or several texts as a list; None if there are none."""
    return [value] if isinstance(value, str) else list(value) if value else None

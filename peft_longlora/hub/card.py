"""An adapter's model card: what its README.md says, and how a text that is there already is treated.

`LongLoraConfig.save_pretrained` calls `write_card`, so every way of saving an adapter leaves a card; `hub` brings it
to the Hub. The text itself is one template, templates/adapter_card.md.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from peft_longlora.adapter.files import hub_id
from peft_longlora.hub.results import Row, copy_results, read_results
from peft_longlora.kernels.groups import group_size_of

if TYPE_CHECKING:
    from peft_longlora.adapter.config import LongLoraConfig

TEMPLATE = Path(__file__).parent / "templates" / "adapter_card.md"
README = "README.md"
BEGIN = "<!-- peft-longlora: this part is written anew at every save; what stands outside of it is kept -->"
END = "<!-- peft-longlora: end -->"
# Written by libraries into a README that nobody has touched: lines of theirs that vary.
_LIBRARY_LINE = re.compile(
    r"- PEFT \S+|### Framework versions|## Training procedure|The following `bitsandbytes` quantization config .*"
    r"|- (_?load_in_|quant_method|llm_int8_|bnb_4bit_)\w*: .*|This is the model card of a \S+ transformers model .*"
)
_TRL_HEADINGS = {"Quick start", "Training procedure", "Framework versions", "Citations"}

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
    """

    template: str | Path | None = None
    license: str | None = None
    datasets: list[str] | None = None
    language: list[str] | None = None
    tags: tuple[str, ...] = ()
    results: str | Path | None = None
    base_license: str | None = None

    @classmethod
    def of(cls, config: LongLoraConfig) -> CardOptions:
        """The options that were set for an adapter, or none."""
        return getattr(config, "_card", None) or cls()


def write_card(
    config: LongLoraConfig, folder: str | os.PathLike, adapter: str | None = None, subfolder: str | None = None
) -> Path:
    """Write or update README.md in an adapter's folder.

    A README of somebody's own keeps its text and gets our metadata, as PEFT does it. One that a library drafted is
    replaced; in one of ours, what stands between the two marks is.

    Args:
        config: of the adapter.
        folder: of the adapter; a results.json and plots (*.png) that lie there are shown.
        adapter: what the card loads, the id of a repository. None: the folder.
        subfolder: of that repository, where the adapter lies in one.

    Raises:
        ValueError: the template, the README's metadata or results.json cannot be read.
    """
    folder = Path(folder)
    path = folder / README
    if source := CardOptions.of(config).results:
        copy_results(Path(source), folder)
    results, plots = read_results(folder)
    old = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    try:
        card = make_card(config, adapter or str(folder), results, plots, old=old, subfolder=subfolder)
    except yaml.YAMLError as error:
        raise ValueError(
            f"The metadata at the top of {path} cannot be read: {' '.join(str(error).split())}. Correct it, or delete "
            f"the file."
        ) from error
    # In one step, so that a full disk leaves the old card, and never through a link into somebody's cache.
    draft = folder / f".{README}.{os.getpid()}"
    try:
        draft.write_text(str(card), encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
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
    if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name):
        path = folder.parent / README
        if not path.is_file() or is_draft(
            ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True).text
        ):
            try_card(config, folder.parent)


def try_card(config: LongLoraConfig, folder: str | os.PathLike, *where: str | None) -> None:
    """`write_card`, for where hours of training should not end in a README."""
    try:
        write_card(config, folder, *where)
    except ValueError as error:
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
    tags |= {"longlora", "lora", "peft", "transformers", *options.tags}
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
        "subfolder_literal": json.dumps(subfolder) if subfolder else None,
        "license": data.get("license"),
        "datasets": [datasets] if isinstance(datasets, str) else datasets,
        "results": results or [],
        "plots": plots or [],
        **(extra or {}),
    }
    card = _render(ModelCardData(**data), options.template, variables)
    text = f"{BEGIN}\n{card.text.strip()}\n{END}"
    start, end = before.text.find(BEGIN), before.text.find(END)
    if 0 <= start < end:
        card.text = before.text[:start] + text + before.text[end + len(END) :]
    elif is_draft(before.text):
        card.text = f"\n{text}\n"
    else:
        logger.warning(f"The README of {adapter} is not peft-longlora's. Its text stays; its metadata is up to date.")
        card.text = before.text
    card.text = card.text.rstrip() + "\n"
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


def is_draft(text: str) -> bool:
    """Whether a README's text is what a library wrote, with nothing of a person's own in it."""
    if not text.strip() or ("model card has been generated automatically" in text and "remove this comment" in text):
        return True
    if "It has been trained using [TRL]" in text:
        return {line.lstrip("# ") for line in text.splitlines() if line.startswith("##")} <= _TRL_HEADINGS
    empty = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    lines = (line.strip() for line in text.splitlines())
    return all(line in empty or _LIBRARY_LINE.fullmatch(line) for line in lines)


def _variables(config: LongLoraConfig, adapter: str, base: str | None, name: str) -> dict[str, Any]:
    """What a template can use besides the metadata. Text from a config reaches Python code as a literal only."""
    window = config.applied_context_length or config.context_length or config.base_context_length
    rope = config.applied_rope_parameters
    modules = config.target_modules
    return {
        "config": config,
        "name": name,
        "adapter_literal": json.dumps(adapter),
        "base_model": base,
        "base_literal": json.dumps(base),
        "base_window": config.base_context_length,
        "window": window,
        "is_extended": bool(window and config.base_context_length and window > config.base_context_length),
        "rope_json": json.dumps(rope, sort_keys=True) if rope else None,
        "pattern_text": _pattern_text(config, window),
        "targets": ", ".join(f"`{m}`" for m in sorted(modules)) if isinstance(modules, (set, list)) else f"`{modules}`",
        "modules_to_save": ", ".join(f"`{m}`" for m in config.modules_to_save or ()),
        "versions": _versions(config),
    }


def _pattern_text(config: LongLoraConfig, window: int | None) -> str:
    if config.attention_pattern == "full":
        return "`full`: dense"
    size = config.applied_group_size or config.group_size
    if size is None and window:  # an adapter of before it was recorded
        size = group_size_of(None, config.group_size_ratio, config.context_length or window)
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

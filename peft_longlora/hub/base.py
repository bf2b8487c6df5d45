"""What a push says of the base: its id on the Hub in place of a folder of this machine, and the same in every file.

Called by `folder` and `push`; `trainers` and `methods` warn with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME
from transformers.utils import logging

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import hub_id
from peft_longlora.hub.draft import Remote
from peft_longlora.hub.provenance import RECIPE
from peft_longlora.hub.readme import README, UNREADABLE, read_readme
from peft_longlora.hub.results import RESULTS

logger = logging.get_logger(__name__)


def check_base_id(base: str | None) -> None:
    """Refuse a base that nobody else can load.

    Raises: ValueError: it is no id on the Hub.
    """
    if base is not None and hub_id(base) is None:
        raise ValueError(f"base={base!r} is no id on the Hub ('owner/name').")


@contextmanager
def naming_bases(configs: Iterable[LongLoraConfig], base: str | None, remote: Remote, draft: Path) -> Iterator[None]:
    """Within the block, configs that are saved name their base as the Hub does. Warns of one that is not there.

    Args:
        base: its id, if the user gave it. draft: as for `base_on_hub`.
    """
    before = [(config, config.base_model_name_or_path) for config in configs]
    try:
        for config, local in before:
            if base is not None or hub_id(local) is not None:
                config.base_model_name_or_path = base or local
            else:
                kept = base_on_hub(remote, draft)
                logger.warning(base_note(local, kept))
                config.base_model_name_or_path = kept or local
        yield
    finally:
        for config, local in before:
            config.base_model_name_or_path = local


def warn_of_folder(config: LongLoraConfig) -> None:
    """Warn, once, that a trainer pushes an adapter whose base is a folder of this machine."""
    if hub_id(config.base_model_name_or_path) is None:
        logger.warning_once(
            f"The adapter names the base {config.base_model_name_or_path!r}, which is not on the Hub, so nobody else "
            f"can load what this trainer pushes. Push it once more afterwards: longlora push FOLDER NAME --base "
            f"owner/name."
        )


def base_on_hub(remote: Remote, draft: Path) -> str | None:
    """The base's id that a repository's adapter_config.json names, or else its card; None if neither does.

    Args:
        draft: the folder with the repository's README, as `begin_draft` leaves it.
    """
    named = []
    if CONFIG_NAME in remote.names:
        with TemporaryDirectory() as place:
            file = remote.api.hf_hub_download(remote.repo_id, CONFIG_NAME, revision=remote.revision, local_dir=place)
            named.append(_entry(json.loads, Path(file).read_text(encoding="utf-8"), "base_model_name_or_path"))
    if text := read_readme(draft / README):
        named.append(_entry(lambda text: ModelCard(text).data.to_dict(), text, "base_model"))
    return next((found for each in named if (found := hub_id(each))), None)


def base_note(local: str | None, kept: str | None) -> str:
    """What to tell the user of an adapter whose base is not on the Hub.

    Args:
        local: what the adapter's config names. kept: what the repository names already, and the push takes.
    """
    if kept is not None:
        return (
            f"{CONFIG_NAME} names the base {local!r}, which is not on the Hub. The repository, or the card, names "
            f"{kept!r}: this is taken. Give base='owner/name' for another one."
        )
    return (
        f"{CONFIG_NAME} names the base {local!r}, which is not on the Hub, so nobody else can load the adapter. Push "
        f"again with base='owner/name'."
    )


def name_base(content: Any, local: str | None, base: str | None) -> Any:
    """A part of a file with the base's id in place of its folder, and of any other folder only its last part.

    Args:
        content: text, or a list or dict that holds texts.
        local: what the adapter's config on the disk names as the base.
        base: the base's id on the Hub; None if it is not there.
    """
    if isinstance(content, dict):
        return {key: name_base(value, local, base) for key, value in content.items()}
    if isinstance(content, list):
        return [name_base(value, local, base) for value in content]
    if not isinstance(content, str):
        return content
    is_base = local is not None and hub_id(local) is None and content in (local, Path(local).name)
    if base is not None and (content == local or is_base):
        return base
    return PureWindowsPath(content).name if _is_path(content) else content


def name_base_in(folder: Path, draft: Path, local: str | None, base: str | None) -> None:
    """Put what results.json and recipe.yaml say of the base into a draft, with the base's id and without paths.

    Args:
        folder: the adapter's; its recipe.yaml is copied if it changes.
        draft: has the results already.
        local, base: as for `name_base`.
    """
    if (draft / RESULTS).is_file():
        results = json.loads((draft / RESULTS).read_text(encoding="utf-8"))
        model, notes = results.get("model"), results.get("notes")
        said = {key: value for key, value in (model or {}).items() if key in ("name", "adapter", "tokenizer")}
        named = {"model": {**(model or {}), **name_base(said, local, base)}} if model else {}
        if isinstance(notes, list) and local and hub_id(local) is None:
            last = base or Path(local).name
            named["notes"] = [note.replace(local, last) if isinstance(note, str) else note for note in notes]
        if any(results[key] != value for key, value in named.items()):
            (draft / RESULTS).write_text(json.dumps({**results, **named}, indent=1) + "\n", encoding="utf-8")
    if (folder / RECIPE).is_file():
        text = (folder / RECIPE).read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
        if isinstance(recipe, dict):
            said = {key: value for key, value in recipe.items() if key in ("model", "tokenizer")}
            if (named := name_base(said, local, base)) != said:
                text = yaml.safe_dump({**recipe, **named}, allow_unicode=True)
        (draft / RECIPE).write_text(text, encoding="utf-8")


def _is_path(text: str) -> bool:
    """Whether a name is that of a folder of this machine, or of the one that measured."""
    return text.startswith(("/", "~", "./", "../")) or PureWindowsPath(text).is_absolute() or Path(text).is_dir()


def _entry(parse: Any, text: str, key: str) -> Any:
    """An entry of a file of the Hub; None if the file cannot be read, of which others tell."""
    try:
        return parse(text).get(key)
    except UNREADABLE:
        return None

"""What a push says of the base: its id on the Hub in place of a folder of this machine, and the same in every file.

Called by folder.py and push.py.
"""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME

from peft_longlora.adapter.files import hub_id
from peft_longlora.hub.draft import Remote
from peft_longlora.hub.readme import README, read_readme
from peft_longlora.hub.results import RESULTS

RECIPE = "recipe.yaml"  # what `longlora train` was told, for others


def base_on_hub(remote: Remote, draft: Path, subfolder: str = "") -> str | None:
    """The base's id that a repository's adapter_config.json names, or else its card; None if neither does.

    Args:
        draft: the folder with the repository's README, as `begin_draft` leaves it.
        subfolder: of the repository; "" or a name and "/".
    """
    named = []
    if f"{subfolder}{CONFIG_NAME}" in remote.names:
        with TemporaryDirectory() as place:
            file = remote.api.hf_hub_download(
                remote.repo_id, f"{subfolder}{CONFIG_NAME}", revision=remote.revision, local_dir=place
            )
            named.append(_entry(json.loads, Path(file).read_text(encoding="utf-8"), "base_model_name_or_path"))
    if text := read_readme(draft / README):
        named.append(_entry(lambda text: ModelCard(text).data.to_dict(), text, "base_model"))
    return next((found for each in named if (found := hub_id(each))), None)


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
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return None

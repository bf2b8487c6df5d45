"""`push_folder`: an adapter's folder goes to the Hub as it lies on the disk, in one commit, without loading a model."""

from __future__ import annotations

import fnmatch
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, get_session
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import hub_id, read_config, refuse_link
from peft_longlora.hub.base import base_note, base_on_hub, check_base_id, name_base_in
from peft_longlora.hub.card import CardOptions, as_list, write_card
from peft_longlora.hub.draft import Remote, begin_draft
from peft_longlora.hub.provenance import RECIPE, TRAINING, sha256
from peft_longlora.hub.push import with_base_license, writing_api
from peft_longlora.hub.readme import README
from peft_longlora.hub.results import RESULTS, copy_results, read_results

# What belongs to an adapter. Anything else is left out and named: a Trainer's folder holds pickles, optimizer states
# and logs, and what else lies there may be private.
BELONGS = (
    *(CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, README, RESULTS, "results.md", "*.png", "*.jpg", "*.svg"),
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "*.tiktoken", "chat_template.jinja", "LICENSE*", "NOTICE*", "generation_config.json"),
    *(RECIPE, "recipe.yml", TRAINING),
)


@dataclass(frozen=True)
class Pushed:
    """What `push_folder` did.

    Attributes:
        commit: the Hub's answer, with its url.
        names: files in the commit.
        left_out: files of the folder that are not.
        notes: warnings for the user.
    """

    commit: CommitInfo
    names: list[str]
    left_out: list[str]
    notes: list[str]


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base: str | None = None,
    results: str | os.PathLike | None = None,
    include: Iterable[str] = (),
    license: str | None = None,
    datasets: str | Iterable[str] | None = None,
    language: str | Iterable[str] | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> Pushed:
    """Push an adapter's folder in one commit: weights, card with its results, results.json, plots and tokenizer.

    The card is written anew for the repository. Text that people wrote into the README on the disk or on the Hub is
    kept. The folder itself does not change.

    Args:
        folder: an adapter's folder.
        repo_id: "owner/name" or "name"; the repository is made if it is not there.
        base: the base's id on the Hub, for an adapter that was trained on a base in a folder. None: the one that the
            repository names already, if any.
        results: a folder that `longlora eval` wrote, for results that do not lie with the adapter yet.
        include: patterns of further file names to push, such as "*.csv".
        license: for the card, as for `use_longlora_card`, like the next two.
        datasets: ids of data sets on the Hub.
        language: codes such as "en".
        private: whether a new repository is private.
        token: of the Hub. None: the one that is stored.
        revision: the branch to push to. None: main.
        create_pr: open a pull request instead.
        commit_message: the first line of the commit.

    Returns:
        The commit, and which files are in it.

    Raises:
        ValueError: the folder holds no LongLoRA adapter, a file is damaged, the repository is public although
            `private` was asked for, or the Hub is not reached.
        HfHubHTTPError: the Hub refused. Nothing is committed then; the same call completes the push.
    """
    folder = Path(folder)
    config = _read(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is no name of a repository. Give 'owner/name', or 'name' for one of your own."
        ) from error
    check_base_id(base)
    names, left_out = choose_files(folder, tuple(include))
    local, notes = config.base_model_name_or_path, []
    api = writing_api(token)
    with TemporaryDirectory() as place:
        draft = Path(place)
        try:
            remote = Remote.create(api, repo_id, revision, private)
            if private and not api.repo_info(remote.repo_id).private:
                raise ValueError(
                    f"{remote.repo_id} exists and is public; private=True is only for a new repository. Make it "
                    f"private in its settings, or push to another name."
                )
            begin_draft(remote, "", folder, draft)
        except transport_error() as error:
            raise ValueError(f"The Hub is not reached ({error}). Nothing is pushed; try again.") from error
        if base is None and hub_id(local) is None:
            base = base_on_hub(remote, draft)
            notes.append(base_note(local, base))
        config.base_model_name_or_path = base or local
        _copy_results(folder, Path(results) if results else None, draft)
        if (folder / TRAINING).is_file():
            (draft / TRAINING).write_bytes((folder / TRAINING).read_bytes())
        name_base_in(folder, draft, local, base or hub_id(local))
        if base is not None:
            _write_config(folder, draft, base)
        config.card = CardOptions(
            license=license, datasets=as_list(datasets), language=as_list(language), adapter=remote.repo_id
        )
        config.card = with_base_license(config, api.token)
        config.folder = None  # its results are in the draft already
        write_card(config, draft, weights=sha256(folder / SAFETENSORS_WEIGHTS_NAME))
        files = {name: folder / name for name in names} | {path.name: path for path in draft.iterdir()}
        gone = remote.gone("", draft)
        operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        try:
            commit = api.create_commit(
                remote.repo_id,
                [*operations, *(CommitOperationDelete(name) for name in gone)],
                commit_message=commit_message or "Upload adapter",
                revision=revision,
                create_pr=create_pr,
            )
        except transport_error() as error:
            raise ValueError(
                f"The Hub was lost while files went there ({error}). Nothing is committed; the same call completes it."
            ) from error
    return Pushed(commit, sorted(files), left_out, notes)


def transport_error() -> type[Exception]:
    """The class of errors if the Hub is not reached: httpx's with huggingface_hub 1, httpx2's with 2."""
    return sys.modules[type(get_session()).__module__.partition(".")[0]].TransportError


def choose_files(folder: Path, include: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """Names of an adapter's files in a folder, and of what else lies there (folders end with "/").

    Raises: ValueError: a file of the adapter is a link out of the folder.
    """
    names, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in (*BELONGS, *include)):
            refuse_link(path)
            names.append(path.name)
        else:
            left_out.append(path.name + "/" * path.is_dir())
    return names, left_out


def _read(folder: Path) -> LongLoraConfig:
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r}: no such folder. Give the folder of an adapter.")
    if not (folder / CONFIG_NAME).is_file():
        merged = " It looks like a whole model: push it with its own push_to_hub, or `hf upload`." * (
            (folder / "config.json").is_file()
        )
        raise ValueError(f"{str(folder)!r}: no {CONFIG_NAME} in it, so it is no adapter.{merged}")
    config = read_config(folder)
    if not isinstance(config, LongLoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{str(folder)!r} is an adapter of type {kind}; only LONGLORA adapters are pushed here.")
    config = LongLoraConfig.from_pretrained(str(folder))
    if config.file is None:
        raise ValueError(f"{str(folder)!r}: no {SAFETENSORS_WEIGHTS_NAME} in it. Save the adapter anew.")
    return config


def _copy_results(folder: Path, results: Path | None, draft: Path) -> None:
    """The results and pictures on the disk take the place of those on the Hub."""
    if results is not None or (folder / RESULTS).is_file():
        copy_results(results or folder, draft)
    if results is None or results.resolve() != folder.resolve():
        for name in read_results(folder)[1]:
            if results is None or not (draft / name).exists():
                (draft / name).write_bytes((folder / name).read_bytes())


def _write_config(folder: Path, draft: Path, base: str) -> None:
    """The adapter's config, with the base's id on the Hub."""
    content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = base
    (draft / CONFIG_NAME).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")

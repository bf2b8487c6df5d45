"""Reads the files of an adapter, in a folder or on the Hub, or refuses them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open

_AGAIN = "Get it again, or save the adapter anew."


class FileMissing(ValueError):
    """The folder or repository does not have the file, or the Hub cannot be asked."""


def find(place: str | os.PathLike, name: str, *, subfolder: str | None = None, **options: Any) -> Path:
    """The path of one of an adapter's files, downloaded if it is on the Hub.

    Args:
        place: a folder, or the id of a repository on the Hub.
        options: for a repository: revision, token, cache_dir and other arguments of hf_hub_download.

    Raises:
        FileMissing: the place has no such file, or the Hub cannot be reached and its cache has no such file.
        ValueError: the place does not exist or may not be read, or the file is a link out of the folder.
        OSError: the disk is full.
    """
    place = str(place)
    if os.path.isdir(place):
        path = Path(place, subfolder or "", name)
        if not path.is_file():
            raise FileMissing(f"{place!r}: no {name} in it.")
        refuse_link(path)
        return path
    asked = {key: options[key] for key in ("revision", "cache_dir", "token") if key in options}
    inner = f"{subfolder}/{name}" if subfolder else name
    if not options.get("local_files_only") and not check_on_hub(place, inner, **asked):
        raise FileMissing(f"{place!r}: no {name} in that repository.")
    try:
        return Path(hf_hub_download(place, name, subfolder=subfolder, **options))
    except LocalEntryNotFoundError as error:
        raise FileMissing(f"{place!r}: no such folder, and the Hub is not reached: {error}") from error
    except EntryNotFoundError as error:
        raise FileMissing(f"{place!r}: no {name} in that repository.") from error
    except HfHubHTTPError as error:
        raise ValueError(f"{place!r}: the Hub refuses: {' '.join(str(error).split())[:300]}") from error


def check_on_hub(
    name: str, file: str, *, revision: str | None = None, cache_dir: str | None = None, token: str | bool | None = None
) -> bool:
    """Whether a repository has a file, in the Hub's cache here or on the Hub; asked once.

    Downloads ask six times, for half a minute, and say every time that they failed.

    Args:
        name: the repository, "owner/name".
        file: its path in the repository.

    Raises:
        FileMissing: the Hub cannot be asked.
        ValueError: the name can be no id; there is no such repository or revision, or the user may not see it.
    """
    if hub_id(name) is None:
        raise ValueError(f"{name!r}: no such folder, and no id on the Hub ('owner/name').")
    if isinstance(try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision), str):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), token=token)
    except RepositoryNotFoundError as error:  # the Hub also says this of a repository that the user may not see
        raise ValueError(
            f"{name!r}: no such folder, and no such repository on the Hub. Check the name; if it is private or gated, "
            f"log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{name!r}: no revision {revision!r} on the Hub. Check the name of the branch or tag."
        ) from error
    except EntryNotFoundError:
        return False
    except HfHubHTTPError:  # the Hub is there and does not answer now: a download asks again
        return True
    except OfflineModeIsEnabled as error:
        raise FileMissing(
            f"{name!r}: no such folder, and not in the cache of the Hub, which HF_HUB_OFFLINE keeps from being asked."
        ) from error
    except Exception as error:  # of the library that the Hub's client speaks through, which is not always the same
        raise FileMissing(
            f"{name!r}: no such folder, and the Hub is not reached to look for it there ({error}). Check the name, or "
            f"the connection."
        ) from error
    return True


@dataclass(frozen=True)
class AdapterFile:
    """The table of contents of an adapter's safetensors file: tensor names and shapes, no weights."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Read the header of a safetensors file.

        Raises: ValueError: the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return cls(path, {name: tuple(file.get_slice(name).get_shape()) for name in names})
        except SafetensorError as error:
            cure = "Copy or download it again."
            if "snapshots" in path.parts:  # in the Hub's cache, which does not download a file again
                cure = f"Delete {path.resolve()}, or load with force_download=True, and check the file on the Hub."
            raise ValueError(f"{path} ({path.stat().st_size} bytes) is damaged: {error}. {cure}") from error

    def check_numbers(self, names: Iterable[str]) -> None:
        """Refuse these tensors if they cannot be weights (`check_numbers`). One is read at a time."""
        check_numbers(self.tensors(names), str(self.path))

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """These tensors by name, one at a time."""
        with safe_open(self.path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json.

    Raises: ValueError: it is not a JSON object, or its type of adapter is not named or unknown.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: the JSON is nested too deeply. {_AGAIN}") from error
    except ValueError as error:  # no text, no JSON, or a number of more digits than Python reads
        raise ValueError(f"{path} is damaged: {error}. {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the object that PEFT writes. {_AGAIN}")
    if (kind := content.get("peft_type")) is None:
        raise ValueError(f"{path} names no peft_type, so its kind of adapter is not known. {_AGAIN}")
    if str(kind) not in PeftType.__members__:
        raise ValueError(
            f"{path}: peft_type={kind!r} is unknown. It must be one of {', '.join(PeftType.__members__)}. Update peft "
            f"if a newer one made the adapter; otherwise get it again, or save it anew."
        )
    return content


def read_config(place: str | os.PathLike, **options: Any) -> PeftConfig:
    """The config of an adapter of any type, in a folder or on the Hub.

    Args: as those of `find`.

    Raises: ValueError: there is none, or it cannot be read. PEFT's own reader ends in errors that name no file.
    """
    with naming(find(place, CONFIG_NAME, **options)):
        return PeftConfig.from_pretrained(str(place), **options)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """While PEFT reads an adapter_config.json: what it fails on is a `ValueError` that names the file.

    Raises: ValueError: as `read_json`, or a field has a name or a value that this type of adapter cannot have.
    """
    read_json(path)
    try:
        yield
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}. {_AGAIN}") from error


def is_link_out(file: Path) -> bool:
    """Whether a file is a link out of its folder. (In the Hub's cache all files are links within it.)"""
    folder = file.parent.resolve()
    repository = next((parent.parent for parent in folder.parents if parent.name == "snapshots"), folder)
    return file.is_symlink() and not file.resolve().is_relative_to(repository)


def refuse_link(file: Path) -> None:
    """Refuse an adapter's file that is a link out of its folder.

    Raises: ValueError.
    """
    if is_link_out(file):
        raise ValueError(
            f"{file} is a link to {file.resolve()}, out of the adapter's folder. Put the file itself there, or load "
            f"the folder that holds it."
        )


def hub_id(name: Any) -> str | None:
    """`name` if it can be a repository id on the Hub; None if it is a folder or anything else."""
    if not isinstance(name, str) or os.path.isdir(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def check_numbers(state: Iterable[tuple[str, torch.Tensor]], place: str) -> None:
    """Refuse weights that are whole numbers, or not finite: the model would compute nothing, and say nothing.

    Args:
        state: names and tensors of an adapter's weights. place: where they come from.

    Raises: ValueError.
    """
    for name, tensor in state:
        # Tensors of other types lie in several processes, and empty or meta ones hold nothing yet.
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta or not tensor.numel():
            continue
        wrong = None
        if not tensor.is_floating_point():
            wrong = f"holds {tensor.dtype}, and weights are floating-point numbers"
        else:  # the least and the largest number need no second tensor, and NaN is both
            ends = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()
            if not all(end.isfinite() for end in ends.aminmax()):
                wrong = "holds numbers that are not finite (NaN or infinity)"
        if wrong:
            raise ValueError(
                f"{place}: tensor {name} {wrong}. The file is damaged, or the training that made it diverged. Get it "
                f"again, or take an earlier checkpoint."
            )


def check_gathered(state: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Refuse to save an adapter if other processes hold its weights.

    Raises: ValueError: a tensor of the adapter is empty.
    """
    for name, tensor in state.items():
        if f".{adapter_name}." in f"{name}." and tensor.numel() == 0:
            raise ValueError(
                f"{name} is empty here: DeepSpeed ZeRO-3 splits weights over the processes, so the adapter would be "
                f"saved without it. Save with trainer.save_model(), or with model.save_pretrained(folder, "
                f"state_dict=state), where state = accelerator.get_state_dict(engine) is called by all processes."
            )

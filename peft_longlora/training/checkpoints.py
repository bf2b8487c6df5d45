"""Where a run goes on: its last whole checkpoint, and whether the recipe is still the one that made it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from peft_longlora.hub.provenance import RECIPE
from peft_longlora.hub.writing import file_in_the_way, write_whole
from peft_longlora.training.damage import check_checkpoint, read_mapping
from peft_longlora.training.recipe import ADAPTER, Recipe, keys

STATE_FILE = "trainer_state.json"  # the Trainer's
RUN_FILE = "run.yaml"  # all values, to go on from. RECIPE holds the same for others, without paths of this machine
PRIVATE = {"output_dir", "overwrite", "hub_token", "hub_model_id", "push_to_hub", "logging_dir"}
# Keys of the Trainer that change what is learned, so they must stay when a run goes on.
TRAINED_WITH = {
    "seed", "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_length",
    "per_device_train_batch_size", "gradient_accumulation_steps", "packing", "packing_strategy", "padding_free",
    "label_smoothing_factor", "neftune_noise_alpha", "loss_type", "shuffle_dataset", "train_sampling_strategy",
    "average_tokens_across_devices", "dataloader_drop_last", "router_aux_loss_coef",
}  # fmt: skip
# Keys of ours that change it.
TRAINED_ON = {
    "model", "model_revision", "tokenizer", "dtype", "four_bit", "data", "kind", "split", "data_config", "text_field",
    "skip_empty", "repositories", "too_long", "max_rows", "sequence_parallel", "embedding_learning_rate",
}  # fmt: skip


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a Trainer's output folder; None if there is none.

    The Trainer writes its state last, so a checkpoint without it was cut short by a full disk or a killed process.

    Args:
        folder: the output folder.
    """
    return next(iter(_whole_checkpoints(folder)), None)


def _whole_checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of an output folder, newest first."""
    return [path for path in _checkpoints(folder) if (path / STATE_FILE).is_file()]


def _checkpoints(folder: str | Path) -> list[Path]:
    """The Trainer's checkpoints in an output folder, newest first. What a person named checkpoint-best is none."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def open_output(recipe: Recipe) -> Path | None:
    """The checkpoint from which the run goes on; None if it begins.

    Raises:
        ValueError: the output folder is a file, holds an adapter of another kind of run, a run whose recipe differs
            in a key that changes what is learned, or a checkpoint or a note of the run that cannot be read.
    """
    folder = recipe.output_dir
    if path := file_in_the_way(folder):
        raise ValueError(f"output_dir={str(folder)!r}: {path} is a file. Give a folder.")
    last, *older = _whole_checkpoints(folder) or [None]
    if recipe.run.overwrite:
        return None
    if last is None:
        if (folder / "adapter_config.json").exists():
            raise ValueError(
                f"output_dir={str(folder)!r} holds an adapter and no checkpoint to go on from. Give another "
                f"output_dir, or --overwrite to train it anew."
            )
        return None
    if not (folder / RUN_FILE).is_file():
        raise ValueError(
            f"output_dir={str(folder)!r} holds {last.name} of a run without a {RUN_FILE}. Give another output_dir, or "
            f"--overwrite to begin anew."
        )
    try:
        before = read_mapping(folder / RUN_FILE)
    except ValueError as error:
        raise ValueError(
            f"{folder / RUN_FILE} is damaged: {error}. It says what the run in output_dir={str(folder)!r} was trained "
            f"with, so the run cannot go on. Give another output_dir, or --overwrite to begin anew."
        ) from error
    now = _plain(recipe.values)
    fixed = {name for name, key in keys().items() if key.owner == ADAPTER} | TRAINED_WITH | TRAINED_ON
    for name in sorted(fixed & (before.keys() | now.keys())):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"output_dir={str(folder)!r} holds a run with {name}={before.get(name)!r}, and the recipe says "
                f"{now.get(name)!r}. Give another output_dir, the same value, or --overwrite to begin anew."
            )
    check_checkpoint(last, older, has_optimizer=not before.get("save_only_model"))
    return last


def begin_output(recipe: Recipe) -> None:
    """Write the values into the output folder; with `overwrite`, delete the checkpoints of the run before."""
    folder = recipe.output_dir
    if recipe.run.overwrite:
        for path in _checkpoints(folder):
            shutil.rmtree(path)
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in _plain(recipe.values).items() if name not in ("overwrite", "hub_token")}
    public = {name: _without_path(value) for name, value in values.items() if name not in PRIVATE}
    for name, content in ((RUN_FILE, values), (RECIPE, public)):
        # In one step: a run whose note is half written, as on a full disk, could never go on.
        write_whole(folder / name, yaml.safe_dump(content, allow_unicode=True))


def _without_path(value: Any) -> Any:
    """A file's or folder's name in place of its path."""
    if isinstance(value, list):
        return [_without_path(each) for each in value]
    is_path = isinstance(value, str) and "/" in value and Path(value).exists()
    return Path(value).name if is_path else value


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values as they come back from YAML."""
    return yaml.safe_load(yaml.safe_dump({key: _listed(value) for key, value in values.items()}))


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_listed(each) for each in value]
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)

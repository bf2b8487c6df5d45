"""A run that has reached its end: the same command trains nothing, and makes only what is missing of its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import TrainerState

from peft_longlora.hub.results import RESULTS
from peft_longlora.training.checkpoints import RUN_FILE, STATE_FILE
from peft_longlora.training.damage import damage_of
from peft_longlora.training.finish import EVALUATION
from peft_longlora.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import Trainer
    from trl import SFTConfig

SAVE, MEASURE, PUSH = "the adapter", "the measurement of eval_data", "the push"
MEASURED_WITH = ("eval_data", "eval_split", "eval_lengths", "eval_windows", "data_config", "text_field", "repositories")


def is_complete(last: Path | None, arguments: SFTConfig) -> bool:
    """Whether a checkpoint has all steps, or all epochs, that are asked for.

    Args:
        last: the newest whole checkpoint.
        arguments: of the run that would go on from it.
    """
    if last is None:
        return False
    state = _state(last)
    if arguments.max_steps > 0:
        return state["global_step"] >= arguments.max_steps
    return (state.get("epoch") or 0.0) >= arguments.num_train_epochs - 1e-9


def missing_parts(recipe: Recipe, last: Path) -> list[str]:
    """What a completed run still lacks, of `SAVE`, `MEASURE` and `PUSH`. Call it before `begin_output`.

    The loss of held-out records is only said, so it always counts as missing; so does a push that is asked for,
    because only the Hub knows of it.
    """
    folder, missing = recipe.output_dir, []
    weights, results = folder / SAFETENSORS_WEIGHTS_NAME, folder / EVALUATION / RESULTS
    is_saved = weights.is_file() and (folder / STATE_FILE).is_file() and (folder / "README.md").is_file()
    is_saved = is_saved and damage_of(folder) is None
    if not is_saved or _state(folder)["global_step"] != _state(last)["global_step"]:
        missing.append(SAVE)
    if recipe.run.eval_data:
        before = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8"))
        is_same = all(before.get(name) == recipe.values.get(name) for name in MEASURED_WITH)
        is_newer = results.is_file() and weights.is_file() and results.stat().st_mtime >= weights.stat().st_mtime
        if missing or not (is_same and is_newer):
            missing.append(MEASURE)
    return missing + ([PUSH] if recipe.values.get("push_to_hub") else [])


def restore(trainer: Trainer, folder: Path, last: Path, is_saved: bool) -> None:
    """Put the trained weights and the trainer's state into a new trainer.

    Args:
        folder: the output folder. last: the checkpoint at the end.
        is_saved: whether the folder holds the adapter already.

    Raises: ValueError: the weights are shared out over GPUs, and are put together only by training.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"The run in {folder} is complete, and its results are missing. Measure it on one GPU with longlora eval "
            f"--adapter {folder if is_saved else last}."
        )
    trainer.state = TrainerState.load_from_json(str(last / STATE_FILE))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    source = folder if is_saved else Path(best) if best and Path(best).is_dir() else last
    trainer.model.load_adapter(str(source), trainer.model.active_adapter, is_trainable=True)


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))

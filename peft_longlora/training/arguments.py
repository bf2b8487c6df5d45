"""TRL's arguments for a recipe, with what follows from the machine: number types, memory, the number of processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations import get_reporting_integration_callbacks

from peft_longlora.memory.fit import SHORTEST
from peft_longlora.training.recipe import TRAINER, Recipe

if TYPE_CHECKING:
    from trl import SFTConfig

# transformers 5.24 renamed the first to the second, and takes both.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


def make_arguments(recipe: Recipe) -> tuple[SFTConfig, bool]:
    """TRL's arguments, and whether `fit_memory` chooses what is checkpointed.

    Raises: ValueError: a value is refused, a reporter is not installed, or an option needs a GPU.
    """
    from trl import SFTConfig

    given = dict(recipe.of(TRAINER))
    has_gpu = torch.cuda.is_available() and not given.get("use_cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    shared = recipe.run.sequence_parallel
    if processes % shared:
        raise ValueError(
            f"sequence_parallel={shared} does not divide the {processes} processes. Use accelerate launch "
            f"--num_processes {shared} -m peft_longlora train, or a multiple."
        )
    if not has_gpu and (given.get("bf16") or given.get("fp16")):
        raise ValueError("bf16 and fp16 are for GPUs, and there is none here. Leave them out.")
    if not has_gpu and given.get("activation_offloading"):
        raise ValueError("activation_offloading copies from a GPU, and there is none here. Leave it out.")
    if not has_gpu and processes > 1:
        given["use_cpu"] = True  # otherwise transformers looks for as many GPUs
    given.pop("push_to_hub", None)  # finish.py pushes, after the adapter was measured
    given["max_length"] = given.get("max_length") or recipe.config.context_length
    given.setdefault("bf16", has_gpu and not given.get("fp16"))
    given.setdefault("dataloader_pin_memory", has_gpu)
    calls_fit_memory = _calls_fit_memory(recipe.run.fit_memory, given, has_gpu, processes)
    given |= checkpointing(given, calls_fit_memory)
    try:
        arguments = SFTConfig(**given)
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # refuses a reporter that is not installed
    except Exception as error:  # transformers and TRL raise errors of many kinds
        raise ValueError(" ".join(str(error).split())) from error
    return arguments, calls_fit_memory


def checkpointing(given: dict[str, Any], calls_fit_memory: bool) -> dict[str, Any]:
    """The arguments that say whether the Trainer checkpoints every block. They cannot be changed afterwards.

    Args:
        given: what the recipe says. calls_fit_memory: whether `fit_memory` does it instead.
    """
    if calls_fit_memory:
        return {CHECKPOINTING[0]: False}
    name = next((name for name in CHECKPOINTING if name in given), CHECKPOINTING[0])
    if given.get(name) is False or f"{name}_kwargs" in given:
        return {}
    return {f"{name}_kwargs": {"use_reentrant": False}}


def _calls_fit_memory(asked: bool | None, given: dict[str, Any], has_gpu: bool, processes: int) -> bool:
    chosen = [name for name in CHECKPOINTING if name in given]
    if asked and not has_gpu:
        raise ValueError("fit_memory=True measures on a GPU, and there is none here. Leave it out.")
    if asked and chosen:
        raise ValueError(f"fit_memory=True chooses what is checkpointed, so {chosen[0]} must be left out.")
    if asked is not None:
        return asked
    tokens = given["max_length"] * given["per_device_train_batch_size"]
    return has_gpu and processes == 1 and tokens >= 2 * SHORTEST and not chosen

"""What a run needs of this machine, looked at before anything is loaded: packages, a schedule, a token of the Hub.

The Trainer looks at the same later, some of it after hours of training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id
from transformers import BitsAndBytesConfig, Trainer, get_scheduler
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import is_liger_kernel_available

from peft_longlora.training.recipe import Recipe

if TYPE_CHECKING:
    from trl import SFTConfig

# What only a real run shows; `--dry-run` says so.
NOT_CHECKED = (
    "Not checked: whether the base's weights load, whether a step fits into memory, whether attn_backend runs here, "
    "what TRL's trainer refuses when it is made, and whether the Hub takes a push."
)


def check_machine(recipe: Recipe, arguments: SFTConfig) -> None:
    """Refuse what this machine cannot do.

    Raises: ValueError, ImportError: names the key, and what to install or to change.
    """
    if recipe.run.four_bit:
        with_bits = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
        _named("four_bit=True", with_bits.validate_environment)
    _named(f"optim={_plain(arguments.optim)!r}", lambda: _optimizer(arguments))
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel=True needs liger-kernel: pip install liger-kernel, or leave it out.")
    _check_schedule(arguments)
    if recipe.values.get("push_to_hub"):
        name = arguments.hub_model_id or recipe.output_dir.resolve().name
        validate_repo_id(name)
        if not (arguments.hub_token or get_token()):
            raise ValueError(
                "push_to_hub=True needs a token that may write. Log in with `hf auth login`, or set HF_TOKEN."
            )


def _optimizer(arguments: SFTConfig) -> None:
    """What is missing for the optimizer; what else is wrong with it depends on the model."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError:
        raise
    except Exception:  # of many kinds: without a model it may not be made
        return


def _check_schedule(arguments: SFTConfig) -> None:
    given = dict(arguments.lr_scheduler_kwargs or {})
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate)
    steps = arguments.max_steps if arguments.max_steps > 0 else 1000
    warmup = arguments.get_warmup_steps(steps)
    try:
        get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=given)
    except (TypeError, ValueError) as error:
        name = _plain(arguments.lr_scheduler_type)
        raise ValueError(
            f"lr_scheduler_type={name!r} with lr_scheduler_kwargs={given!r} cannot be used: {str(error).rstrip('.')}. "
            f"Correct lr_scheduler_kwargs, or use another schedule, such as 'cosine'."
        ) from error


def _named(what: str, check: Callable[[], object]) -> None:
    try:
        check()
    except (ImportError, RuntimeError, ValueError) as error:
        raise type(error)(f"{what} cannot be used here: {' '.join(str(error).split())}") from error


def _plain(value: object) -> str:
    return getattr(value, "value", str(value))

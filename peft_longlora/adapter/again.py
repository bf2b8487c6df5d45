"""Loads weights over an adapter that is there, as a Trainer does when it resumes: only the same adapter's may come.

PEFT reads no config if the name is taken. Weights that were trained with one RoPE, or one `lora_alpha`, would then
compute with another.
"""

from __future__ import annotations

from dataclasses import fields

from peft import LoraConfig

from peft_longlora.adapter import fit
from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.inits import check_init
from peft_longlora.adapter.merged import is_merged
from peft_longlora.adapter.model import LongLoraModel
from peft_longlora.adapter.wishes import check_wishes

# Fields that do not change what given weights compute: how weights are made and trained, what a file says of itself.
# Which modules the adapter has is read from the file's tensors.
_OF_TRAINING = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "lora_dropout", "init_lora_weights", "bias"),
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "trainable_token_indices", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core"),
}
_COMPUTES = [each.name for each in fields(LoraConfig) if each.name not in _OF_TRAINING]


def check_again(name: str, config: LongLoraConfig, tuner: LongLoraModel, place: str) -> None:
    """Refuse to fill an adapter that is merged, or from a file of an adapter that computes otherwise.

    Args:
        name: of the adapter that is there. config: of the file. place: the file's folder or repository.

    Raises: ValueError.
    """
    there = tuner.peft_config[name]
    if is_merged(tuner.model):
        raise ValueError(
            f"Adapter {name!r} is merged into the base's weights, where other weights from {place} would not arrive. "
            f"Call unmerge_adapter() first."
        )
    check_wishes(config, tuner.model, {name: there}, f"the one in {place}")
    changes_base = there.changes_base or config.changes_base  # then weights belong to the base that this left
    for field in [*_COMPUTES, *["init_lora_weights"] * changes_base]:
        ours, theirs = getattr(there, field), getattr(config, field)
        if ours != theirs:
            raise ValueError(
                f"Adapter {name!r} has {field}={ours!r}, and the one in {place} was trained with {field}={theirs!r}: "
                f"its weights would compute something else here. Load it under another name, or give the adapter the "
                f"same settings."
            )
    # A checkpoint that this process wrote itself, as a Trainer's best one, is of the base that it has.
    if config.file is not None and config.file.path.stat().st_mtime < (there.made_at or 0):
        check_init(config.init_lora_weights, None, place)
    fit.check_after(config, tuner.model, tuner.shapes_of(name))

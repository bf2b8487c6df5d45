"""The adapter_config.json of the original project: each field is carried over, has no effect on numbers, or is refused.

`original` calls it. Nothing that changes what the adapter computes is dropped in silence.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig

from peft_longlora.adapter.inits import changes_base

_CARRIED = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "task_type", "use_rslora", "use_dora"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out"),
)
_NEEDED = ("r", "lora_alpha", "target_modules")
_NO_NUMBERS = {
    *("peft_type", "bias", "init_lora_weights"),  # checked by themselves
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config"),
    *("megatron_core", "qalora_group_size", "merge_weights"),  # idle without a switch, which is refused
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),  # of the start, or of training
}
_DEFAULTS = {each.name: each.default for each in fields(LoraConfig) if each.default is not MISSING}
_CURE = (
    "Load the adapter with the version of peft that made it, merge it (merge_and_unload), and use the merged model; "
    "or correct the field if it is wrong"
)


def carried_fields(old: dict[str, Any], place: str) -> dict[str, Any]:
    """The fields of a plain LoRA adapter that its conversion keeps.

    Args:
        old: the content of adapter_config.json. place: where it comes from, for messages.

    Returns: arguments of LongLoraConfig.

    Raises: ValueError: a field that changes numbers is missing, or cannot be carried over.
    """
    if old.get("peft_type") != "LORA" or old.get("bias", "none") != "none":
        raise ValueError(
            f"{place}: peft_type={old.get('peft_type')!r}, bias={old.get('bias')!r}; the original's adapters have "
            f"'LORA' and 'none'."
        )
    for name in _NEEDED:
        if old.get(name) in (None, [], ""):
            raise ValueError(
                f"{place} has {name}={old.get(name)!r}, and the weights do not say what it was. Write the value that "
                f"the adapter was trained with into the file, or get it again."
            )
    scales = {"lora_alpha": old["lora_alpha"], "alpha_pattern": old.get("alpha_pattern")}
    for name, value in scales.items():
        if 0 in (value.values() if isinstance(value, dict) else [value]):
            raise ValueError(
                f"{place}: {name}={value!r} multiplies LoRA's product by 0, so these weights would do nothing. Write "
                f"the value that the adapter was trained with into the file, or get it again."
            )
    start = old.get("init_lora_weights")
    if changes_base(start):
        raise ValueError(
            f"{place}: init_lora_weights={start!r} changed the base's own weights before training. Make it a plain "
            f"LoRA with peft first (path_initial_model_for_weight_conversion of save_pretrained)."
        )
    for name, value in old.items():
        if name in _CARRIED or name in _NO_NUMBERS or not value or value == _DEFAULTS.get(name):
            continue
        known = "the conversion does not carry this field over" if name in _DEFAULTS else "this peft has no such field"
        raise ValueError(f"{place}: {name}={value!r} may change what the adapter computes, and {known}. {_CURE}.")
    return {name: old[name] for name in _CARRIED if name in old}

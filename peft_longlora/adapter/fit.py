"""Checks that an adapter fits its model, and the file with its weights. Nothing is changed here.

`check_before` is called before the adapter is put on the model, and `check_after` when it is in place.
"""

from __future__ import annotations

import re

import transformers
from packaging.version import Version
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PreTrainedModel
from transformers.utils import logging

from peft_longlora.adapter import trainable
from peft_longlora.adapter.base import check_base
from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.count import count_in, without_count
from peft_longlora.adapter.filled_in import check_filled_in
from peft_longlora.adapter.inits import check_init, warning_of
from peft_longlora.adapter.regexes import check_patterns
from peft_longlora.adapter.wishes import check_wishes
from peft_longlora.attention.configure import check_device
from peft_longlora.rope import learned
from peft_longlora.rope import state as rotary

logger = logging.get_logger(__name__)
_WRAPPERS = re.compile(r"\.(original_module|modules_to_save|base_layer)(?=\.)")


def check_before(
    config: LongLoraConfig,
    model: PreTrainedModel,
    configs: dict[str, LongLoraConfig],
    tied: list[str],
    *,
    is_for_conversion: bool = False,
) -> None:
    """Refuse an adapter before the model is touched.

    Args:
        configs: the configs of all adapters of the model by name, the new one last.
        tied: names of the modules that share the embeddings' weight.
        is_for_conversion: the adapter only lends its weights to a conversion to plain LoRA, and never computes.

    Raises: ValueError, NotImplementedError.
    """
    _check_ranks(config)
    check_patterns(config, model)
    check_filled_in(config)
    check_base(config, model)
    if not is_for_conversion:
        _check_alone(configs)
    _check_learned(config, model)
    if config.file is None and not is_for_conversion:
        _warn_of_window(config, model)
    if config.file is not None:
        check_init(config.init_lora_weights, model, config.file.path.parent)
    _warn_of_changes(config)
    _check_loader(config)
    if not config.inference_mode:
        check_device(model)
    if config.train_embeddings:
        _check_embeddings(config, model, tied)
    check_wishes(config, model, configs)


def _check_ranks(config: LongLoraConfig) -> None:
    """Refuse ranks that the file's tensors cannot have, before memory is taken for them."""
    if config.file is None:
        return
    sizes = [size for name, shape in config.file.shapes.items() if "lora_" in name for size in shape]
    largest = max([config.r, *config.rank_pattern.values()])
    if sizes and largest > max(sizes):
        raise ValueError(
            f"{config.file.path}: the config beside it says r={largest} (r or rank_pattern), but no size of a tensor "
            f"in it is above {max(sizes)}. One of the two files is damaged or belongs to another adapter: get both "
            f"again."
        )


def _check_learned(config: LongLoraConfig, model: PreTrainedModel) -> None:
    """Refuse to learn a RoPE that is not rescaled."""
    window = rotary.rope_of(model, scaled=False).window
    if config.rope_type == "learned" and (config.context_length or 0) <= window:
        raise ValueError(
            f"rope_type='learned' starts from yarn's factors for a longer window, and context_length="
            f"{config.context_length} is not above the base's {window} tokens. Give a longer one, or leave rope_type "
            f"out."
        )
    if config.rope_type == "learned":
        learned.check(model, list(trainable.find_rotary(model).values()))


def _warn_of_window(config: LongLoraConfig, model: PreTrainedModel) -> None:
    """Warn, once for all that a command makes, of a window that is no longer than the base's: LoRA alone is trained."""
    window = rotary.rope_of(model, scaled=False).window
    if config.context_length is not None and config.context_length <= window and config.rope_parameters is None:
        logger.warning_once(
            f"context_length={config.context_length} is not above the base's own window of {window} tokens: RoPE stays "
            f"as it is, and nothing is extended."
        )


def _check_embeddings(config: LongLoraConfig, model: PreTrainedModel, tied: list[str]) -> None:
    """Refuse to train a copy of embeddings that get LoRA too, or that the output layer is, or was, tied to in vain."""
    if config.ensure_weight_tying and not tied:
        if config.base_context_length is None:
            raise ValueError(
                "ensure_weight_tying=True, but this model's output layer is not tied to its embeddings. Leave "
                "ensure_weight_tying out: where a model ties them, the trained embeddings are tied too."
            )
        raise ValueError(
            f"The adapter was trained on embeddings tied to the output layer, but this model's are not tied. Load the "
            f"base that the adapter names ({config.base_model_name_or_path})."
        )
    names = {**dict.fromkeys(trainable.find_embeddings(model), "which holds the embeddings")}
    names |= dict.fromkeys(tied, "which is tied to the embeddings")
    for name, what in names.items():
        if config.target_modules and check_target_module_exists(config, name):
            raise ValueError(
                f"target_modules={config.target_modules!r} puts LoRA on {name}, {what}, and train_embeddings=True "
                f"trains a copy of it. Leave {name} out of target_modules, or set train_embeddings=False."
            )
    if tied and getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise NotImplementedError(
            f"{tied[0]} is tied to the embeddings and has a bias, which PEFT drops from the copy it trains. Use "
            f"train_embeddings=False, or untie the model."
        )


def _changes_of_base(config: LongLoraConfig) -> list[str]:
    """What an adapter changes on the base itself, which other adapters would see."""
    changes = []
    if config.changes_base:
        changes.append(f"init_lora_weights={config.init_lora_weights!r} changes the base's weights")
    if config.kasa_config is not None:
        changes.append("kasa_config drops the least singular values of the base's weights")
    if config.bias != "none":
        changes.append(f"bias={config.bias!r} trains the base's own biases")
    if config.layer_replication:
        changes.append(f"layer_replication={config.layer_replication!r} changes the base's layers")
    return changes


def _check_alone(configs: dict[str, LongLoraConfig]) -> None:
    """Refuse two adapters on one model if either changes the base, whichever comes first."""
    for name, config in reversed(configs.items()):
        others, changes = [other for other in configs if other != name], _changes_of_base(config)
        if others and changes:
            plain = (
                ", or convert it to a plain LoRA first (path_initial_model_for_weight_conversion of save_pretrained)"
            )
            raise ValueError(
                f"Adapter {name!r}: {changes[0]}, on which {others} build: they would compute something else. Load "
                f"{name!r} on its own model{plain if config.changes_base else ''}."
            )


def _warn_of_changes(config: LongLoraConfig) -> None:
    """Warn if switching the adapter off, or removing it, cannot give the base back."""
    for change in _changes_of_base(config):
        logger.warning(
            f"{change}. disable_adapter(), unload() and the reference of DPO then give the changed base; load the "
            f"base again to get it unchanged."
        )
    if config.file is None and (warning := warning_of(config.init_lora_weights)):
        logger.warning(warning)
    changing = ("train_embeddings", "train_norms", "context_length", "rope_parameters")
    if config.alora_invocation_tokens and (names := [name for name in changing if getattr(config, name)]):
        logger.warning(
            f"alora_invocation_tokens={config.alora_invocation_tokens!r}: LoRA begins at these tokens, but "
            f"{', '.join(names)} change every token, so the base's keys and values before them cannot be used."
        )


def _check_loader(config: LongLoraConfig) -> None:
    """Refuse adapters of which transformers' own loaders (load_adapter, AutoModelForCausalLM) would lose parts."""
    is_ours = config.file is not None or config.base_context_length is None or config.resolved_for is not None
    what = []
    if config.use_dora:  # as of 5.23, for stock LoRA too
        what.append("DoRA's magnitudes")
    if config.modules_to_save and Version(transformers.__version__) < Version("5.18"):
        what.append("embeddings and norms")
    if what and not is_ours:
        raise NotImplementedError(
            f"transformers {transformers.__version__} loses {' and '.join(what)} when it loads an adapter itself. Load "
            f"it with peft: PeftModel.from_pretrained(model, folder). To pass a config to it, read the config with "
            f"LongLoraConfig.from_pretrained(folder), not with PeftConfig."
        )


def check_after(config: LongLoraConfig, model: PreTrainedModel, wanted: dict[str, tuple[int, ...]]) -> None:
    """Compare the tensors of a new adapter with the file that its weights come from.

    Args:
        wanted: the shapes of the adapter's tensors, by their names in the file.

    Raises: ValueError: a tensor is missing from the file, is too many, has another shape, or holds what no weights are.
    """
    if config.file is None:
        return
    found, path = without_count(config.file.shapes), config.file.path
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(wanted)} tensors that this model's adapter has, the first "
            f"being {missing[0]}. The file is incomplete, or belongs to another base than this model "
            f"(it names {config.base_model_name_or_path})."
        )
    # The file may also hold the base's own embeddings and output layer, under the names of PEFT's wrappers.
    embeddings = _embedding_shapes(model)
    extra = {name: _WRAPPERS.sub("", name) for name in sorted(found.keys() - wanted.keys())}
    needed = wanted | {name: embeddings[plain] for name, plain in extra.items() if plain in embeddings}
    for name, shape in needed.items():
        if found[name] != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {found[name]}, but this model needs {shape}. The adapter belongs to "
                f"another base (it names {config.base_model_name_or_path}), or to that base with another vocabulary "
                f"(model.resize_token_embeddings)."
            )
    if foreign := [name for name in extra if name not in needed and ".lm_head." not in name]:
        raise ValueError(
            f"{path} holds {len(foreign)} tensors that this model has no place for, the first being {foreign[0]}. The "
            f"adapter belongs to another base (it names {config.base_model_name_or_path})."
        )
    config.file.check_numbers(found)
    for name, tensor in config.file.tensors(config.file.shapes.keys() - found.keys()):
        count_in(name, tensor)


def _embedding_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The names in the file, and the shapes, of the base's own tensors that PEFT saves if they were resized."""
    return {
        f"base_model.model.{name}.{key}": tuple(parameter.shape)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        for name, module in trainable.find_module(model, layer)
        for key, parameter in module.named_parameters()
    }

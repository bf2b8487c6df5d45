"""Whether an adapter fits the model it is added to, and the file that it is filled from.

Called by `model` while an adapter is added; changes nothing.
"""

from __future__ import annotations

import re

import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from peft_longlora.adapter import trainable
from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.count import without_count
from peft_longlora.adapter.state import AdapterState
from peft_longlora.architecture import rows_of
from peft_longlora.rope import state as rotary

_WRAPPERS = re.compile(r"\.(original_module|modules_to_save|base_layer)(?=\.)")


def check_place(model: nn.Module, adapter_name: str) -> None:
    """Refuse a base that another model with an adapter is built on already: both would change its RoPE and attention.

    Raises: ValueError.
    """
    if isinstance(model, PeftModel | BaseTuner):
        raise ValueError(
            f"{type(model).__name__} is a model with an adapter already. Give get_peft_model and PeftModel a base, "
            f"such as model.unload(); for one more adapter on it, call model.add_adapter or model.load_adapter."
        )
    state, names = AdapterState.on(model), list(getattr(model, "peft_config", None) or ())
    # transformers' add_adapter and load_adapter, and PEFT's inject_adapter_in_model, make a tuner for each adapter.
    takes_more = state is None or not state.is_in_peft_model or getattr(model, "_hf_peft_config_loaded", False)
    if state is not None and (adapter_name in names or not takes_more):
        raise ValueError(
            f"This model has a LongLoRA adapter {names[0]!r} already, in the PeftModel that was made of it before. "
            f"Call unload() of that one first; for one more adapter on it, call its add_adapter or load_adapter."
        )


def check_base(config: LongLoraConfig, model: nn.Module) -> None:
    """Refuse an adapter that was made for another base, by the sizes that its config names.

    Raises: ValueError.
    """
    made_for = getattr(config, "_resolved_for", None)
    if made_for not in (None, model.config.model_type):
        raise ValueError(
            f"This LongLoraConfig was filled in for {made_for}: its target_modules and modules_to_save are not those "
            f"of {model.config.model_type}. Make a new LongLoraConfig for each model."
        )
    base = rotary.rope_of(model, scaled=False)
    rows = rows_of(model.get_input_embeddings())
    if config.vocab_size is not None and config.train_embeddings and rows != config.vocab_size:
        raise ValueError(
            f"The adapter was made for a vocabulary of {config.vocab_size} tokens, this model has {rows}. The "
            f"vocabulary is never resized: load the base that the adapter names "
            f"({config.base_model_name_or_path}), or call model.resize_token_embeddings({config.vocab_size}) "
            f"yourself if you know the extra tokens."
        )
    # Adapters of version 1 may state the base's max_position_embeddings, which is not its window with linear scaling.
    if config.base_context_length not in (None, base.window, base.max_position_embeddings):
        raise ValueError(
            f"The adapter was made for a base with a window of {config.base_context_length} tokens "
            f"(max_position_embeddings), this model has {base.window}. Load the base that the adapter names "
            f"({config.base_model_name_or_path}). For a new adapter make a new LongLoraConfig: this one was filled in "
            f"for another model."
        )


def check_tie(config: LongLoraConfig, model: PreTrainedModel, tied: list[str]) -> None:
    """Refuse embeddings that cannot be trained together with the output layer that they are, or were, tied to.

    Args:
        tied: names of the modules that share the embeddings' weight.

    Raises: ValueError, NotImplementedError.
    """
    if config.base_context_length is not None and config.ensure_weight_tying and not tied:
        raise ValueError(
            f"The adapter was trained on embeddings tied to the output layer, this model's are not tied. Load the base "
            f"that the adapter names ({config.base_model_name_or_path})."
        )
    if targeted := [name for name in tied if check_target_module_exists(config, name)]:
        raise ValueError(
            f"target_modules={config.target_modules!r} puts LoRA on {targeted[0]}, which is tied to the embeddings, "
            f"and train_embeddings=True trains a copy of both. Leave {targeted[0]} out of target_modules, or set "
            f"train_embeddings=False."
        )
    if tied and getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise NotImplementedError(
            f"{tied[0]} is tied to the embeddings and has a bias, which PEFT drops from the copy it trains. Use "
            f"train_embeddings=False, or untie the model."
        )


def check_loader(config: LongLoraConfig) -> None:
    """Refuse what transformers' own loading (load_adapter, AutoModelForCausalLM) would leave at its first values.

    Raises: NotImplementedError.
    """
    is_ours = (
        config._file is not None
        or config.base_context_length is None
        or getattr(config, "_resolved_for", None) is not None
    )
    what = []
    if config.use_dora:  # as of 5.23, for stock LoRA too
        what.append("DoRA's magnitudes")
    if config.modules_to_save and Version(transformers.__version__) < Version("5.18"):
        what.append("embeddings and norms")
    if what and not is_ours:
        raise NotImplementedError(
            f"transformers {transformers.__version__} loses {' and '.join(what)} when it loads an adapter itself. Load "
            f"it with peft: PeftModel.from_pretrained(model, folder). To give that a config of your own, read it with "
            f"LongLoraConfig.from_pretrained(folder), not with PeftConfig."
        )


def check_whole(state: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Refuse to save an adapter whose weights other processes hold.

    Raises: ValueError: a tensor of the adapter is empty.
    """
    for name, tensor in state.items():
        if f".{adapter_name}." in f"{name}." and tensor.numel() == 0:
            raise ValueError(
                f"{name} is empty here: DeepSpeed ZeRO-3 shares weights out over the processes, and the adapter would "
                f"be saved without it. Save with trainer.save_model(), or with model.save_pretrained(folder, "
                f"state_dict=state), where state = accelerator.get_state_dict(engine) is called by all processes."
            )


def check_file(
    config: LongLoraConfig, wanted: dict[str, tuple[int, ...]], embeddings: dict[str, tuple[int, ...]]
) -> None:
    """Compare the tensors of an adapter just added (name: shape) with the file it will be filled from.

    Args:
        embeddings: the base's own embeddings and output layer, which the file may hold too: PEFT saves them where the
            vocabulary was resized (`save_embedding_layers`), under the names of its wrappers if they have one.

    Raises: ValueError: the file lacks a tensor, or holds one too many or of another shape.
    """
    if config._file is None:
        return
    found, path = without_count(config._file.shapes), config._file.path
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(wanted)} tensors that this model's adapter has, the first "
            f"being {missing[0]}. The file is incomplete, or belongs to another base than this model "
            f"({config.base_model_name_or_path} is the one it names)."
        )
    extra = {name: _WRAPPERS.sub("", name) for name in sorted(found.keys() - wanted.keys())}
    needed = wanted | {name: embeddings[plain] for name, plain in extra.items() if plain in embeddings}
    for name, shape in needed.items():
        if found[name] != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {found[name]}, this model needs {shape}. The adapter belongs to "
                f"another base ({config.base_model_name_or_path} is the one it names), or to that base with another "
                f"vocabulary (model.resize_token_embeddings)."
            )
    if foreign := [name for name in extra if name not in needed and ".lm_head." not in name]:
        raise ValueError(
            f"{path} holds {len(foreign)} tensors that this model has no place for, the first being {foreign[0]}. The "
            f"adapter belongs to another base ({config.base_model_name_or_path} is the one it names)."
        )


def embedding_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names, as they are in files, and shapes of the base's own tensors that PEFT saves where they were resized."""
    return {
        f"base_model.model.{name}.{key}": tuple(parameter.shape)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        for name, module in trainable.find_module(model, layer)
        for key, parameter in module.named_parameters()
    }

"""Makes a plain LoRA adapter for servers from ours.

For servers the merged model is the simplest way (`model.merge_and_unload().save_pretrained(folder)`). `export_lora` is
for servers that keep one base and many LoRA adapters.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper, get_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from peft_longlora.adapter import merged
from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.count import without_count
from peft_longlora.adapter.files import read_json
from peft_longlora.adapter.probe import Probe
from peft_longlora.adapter.trainable import find_module, named_modules
from peft_longlora.hub.lora_card import write_lora_card
from peft_longlora.hub.readme import README
from peft_longlora.hub.writing import file_in_the_way
from peft_longlora.rope.state import attributes_of

PREFIX = "base_model.model."
WRITTEN = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, README, "config.json", "model.safetensors")
# In a tensor's name: it belongs to an adapter, or to what an adapter's copy stands for.
_OF_ADAPTERS = re.compile(r"\.(lora_\w+|modules_to_save|original_module|token_adapter|base_layer)\.")

logger = logging.get_logger(__name__)


def export_lora(
    model: PeftModel,
    folder: str | os.PathLike,
    *,
    fold_into: str | os.PathLike | None = None,
    check: bool = True,
) -> Path:
    """Write a plain `peft_type: LORA` adapter for vLLM, TGI and LoRAX, and a card that says how to start them.

    Args:
        model: a model whose active adapter is a LongLoRA adapter; this adapter is exported.
        folder: for adapter_config.json, adapter_model.safetensors and README.md.
        fold_into: a folder for a complete base model that includes the trained embeddings and norms and the RoPE
            scaling; the adapter then names it as its base. Needed if embeddings or norms were trained.
        check: compare the export with the adapter on a few tokens. It makes no copy of the base.

    Returns:
        The adapter's folder.

    Raises:
        ValueError: there is no active LongLoRA adapter; it is merged or switched off; embeddings, norms or other whole
            modules were trained and fold_into is None; a folder is a file or holds another adapter; an init changed
            the base; or the export computes something else.
    """
    name = _exportable(model, is_folded=fold_into is not None)
    config = model.peft_config[name]
    base = model.get_base_model()
    probe = Probe.of(base) if check else None
    state = without_count(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    weights = {key: tensor.contiguous() for key, tensor in state.items() if "lora_" in key}
    if (whole := sorted(state.keys() - weights.keys())) and fold_into is None:
        raise ValueError(
            f"The adapter holds {len(whole)} trained tensors that are not LoRA's, the first being {whole[0]}, and "
            f"servers of LoRA adapters do not take such tensors. Give fold_into=FOLDER to save them in a copy of the "
            f"base, merge the model, or train with train_embeddings=False, train_norms=False."
        )
    folder = Path(folder)
    _check_places(folder, fold_into)
    folder.mkdir(parents=True, exist_ok=True)
    exported = _plain_config(config, has_copies=bool(whole))
    folded = _folded_state(base, name)
    with _untied_if_unlike(base, folded):
        if fold_into is not None:
            base.save_pretrained(Path(fold_into), state_dict=dict(folded))
            exported.base_model_name_or_path = str(fold_into)
        save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        exported.save_pretrained(folder)
        write_lora_card(model, config, folder, fold_into)
        if probe is not None:
            probe.compare(PeftModel.from_pretrained(_rebuilt(base, folded), folder), "What was exported")
    return folder


def _exportable(model: PeftModel, *, is_folded: bool) -> str:
    """The name of the active adapter, if it is ours and can be a plain LoRA.

    Raises: ValueError.
    """
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    if len(active) > 1:
        raise ValueError(
            f"The adapters {active} are active, and one is exported at a time. Call model.set_adapter(name) first."
        )
    name = active[0] if active else None
    config = model.peft_config.get(name) if name else None
    if not isinstance(config, LongLoraConfig):
        raise ValueError(
            f"{type(model).__name__} has no active LongLoRA adapter to export. Load one with "
            f"PeftModel.from_pretrained(base, adapter)."
        )
    if config.changes_base or config.kasa_config is not None:
        what = f"init_lora_weights={config.init_lora_weights!r}" if config.changes_base else "kasa_config"
        raise ValueError(
            f"{what} changed the base's own weights, which a server would not do. Merge instead: "
            f"model.merge_and_unload().save_pretrained(folder)."
        )
    if config.rope_type == "learned":
        raise ValueError(
            "rope_type='learned': a server takes a base's RoPE from its config, and the learned factors are in the "
            "adapter. Merge instead: model.merge_and_unload().save_pretrained(folder)."
        )
    if config.layer_replication and is_folded:
        raise ValueError(
            f"layer_replication={config.layer_replication!r}: replicated layers share their weights, so no base of its "
            f"own can hold them. Leave fold_into out, or serve the adapter with transformers."
        )
    if any(layer.disable_adapters for layer in merged.layers_of(model)):
        raise ValueError(
            "The adapter is switched off, so the model has its base's RoPE and computes what its base does. Export "
            "outside of model.disable_adapter(), or call enable_adapter_layers() first."
        )
    if merged.is_merged(model):
        raise ValueError(
            "The adapter is merged into the base's weights, so it would be exported twice: in the base and as LoRA. "
            "Call model.unmerge_adapter() first."
        )
    return name


def _plain_config(config: LongLoraConfig, *, has_copies: bool) -> LoraConfig:
    """The config of the exported adapter.

    Args:
        has_copies: embeddings, norms or other whole modules were trained, and are in the folded base.
    """
    plain = {field.name: getattr(config, field.name) for field in fields(LoraConfig) if field.init}
    plain |= {"modules_to_save": None, "trainable_token_indices": None}
    # What ties copies is folded away with them; what ties LoRA of embeddings and output layer stays.
    plain["ensure_weight_tying"] = config.ensure_weight_tying and not has_copies
    return LoraConfig(**{**plain, "inference_mode": True, "peft_type": PeftType.LORA})


def _check_places(folder: Path, fold_into: str | os.PathLike | None) -> None:
    """Refuse folders that cannot be written, and those in which the export would replace something else.

    Raises: ValueError.
    """
    places = {"folder": folder} | ({} if fold_into is None else {"fold_into": Path(fold_into)})
    for name, place in places.items():
        if blocking := file_in_the_way(place):
            raise ValueError(f"{name}={str(place)!r}: {blocking} is a file. Give a folder.")
        if found := next((path for path in map(place.joinpath, WRITTEN) if path.is_dir()), None):
            raise ValueError(
                f"{name}={str(place)!r}: {found} is a folder, but a file of this name is written there. Move it."
            )
        config = place / CONFIG_NAME
        if config.is_file() and read_json(config).get("peft_type") != PeftType.LORA.value:
            raise ValueError(
                f"{name}={str(place)!r} holds an adapter of another type, which would be overwritten. Give another "
                f"folder, or move that adapter."
            )
    if fold_into is not None and folder.resolve() == Path(fold_into).resolve():
        raise ValueError(
            f"folder and fold_into are both {str(folder)!r}. Give two folders: transformers loads the adapter in a "
            f"folder, so the base must be in one of its own."
        )


def _folded_state(base: PreTrainedModel, adapter: str) -> dict[str, torch.Tensor]:
    """The base's tensors with an adapter's embeddings, tokens and norms among them, and without its LoRA.

    Copies are trained in float32 and written in the precision of what they replace, so that the base has one.
    """
    names, dtypes, state = {}, {}, {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            names[f"{name}.base_layer."] = f"{name}."
        elif isinstance(module, ModulesToSaveWrapper):
            names[f"{name}.modules_to_save.{adapter}."] = f"{name}."
            dtypes.update({f"{name}.{key}": p.dtype for key, p in module.original_module.named_parameters()})
        elif isinstance(module, TrainableTokensWrapper):
            names[f"{name}.token_adapter.base_layer."] = f"{name}."
            if adapter in module.token_adapter.token_indices:
                state[f"{name}.weight"] = module.token_adapter.get_merged_weights([adapter]).detach()
    cast: dict[torch.Tensor, torch.Tensor] = {}  # by the tensor: what is tied stays one
    for key, tensor in without_count(base.state_dict(keep_vars=True)).items():
        while found := [prefix for prefix in names if key.startswith(prefix)]:  # wrappers of experts are nested
            inner = max(found, key=len)
            key = names[inner] + key.removeprefix(inner)
        if not _OF_ADAPTERS.search(key):
            if dtypes.get(key, tensor.dtype) != tensor.dtype and tensor not in cast:
                cast[tensor] = tensor.detach().to(dtypes[key])
            state.setdefault(key, cast.get(tensor, tensor.detach()))
    return state


@contextmanager
def _untied_if_unlike(base: PreTrainedModel, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within the block a tied base's config says so only if these tensors are: one of the two may have been trained."""
    ends = [
        state.get(f"{name}.weight")
        for layer in (base.get_input_embeddings(), base.get_output_embeddings())
        for name, _ in find_module(base, layer)
    ]
    is_known = len(ends) == 2 and all(weight is not None and not weight.is_meta for weight in ends)
    is_unlike = is_known and not torch.equal(*ends)
    configs = [c for c in (base.config, base.config.get_text_config()) if getattr(c, "tie_word_embeddings", False)]
    try:
        for config in configs * is_unlike:
            config.tie_word_embeddings = False
        yield
    finally:
        for config in configs:
            config.tie_word_embeddings = True


def _rebuilt(base: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A plain model of these tensors, which it shares with `base`."""
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    plain.load_state_dict(state, assign=True, strict=False)
    plain.tie_weights()
    buffers = {f"{name}.{key}": b for name, module in named_modules(base) for key, b in module._buffers.items()}
    for name, module in plain.named_modules():
        for key in module._buffers:
            module._buffers[key] = buffers.get(f"{name}.{key}", module._buffers[key])
        for key, value in attributes_of(module).items() if hasattr(module, "rope_type") else ():
            setattr(module, key, value)
    if lacking := [name for name, tensor in plain.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"The base that was written lacks {lacking[0]} and {len(lacking) - 1} more tensors.")
    return plain.eval()

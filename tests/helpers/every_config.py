"""A tiny model of any model type of transformers, from its config class alone.

The sizes are lowered by what the fields of configs are called, in the same way for every model type, sub-configs
included. Where this does not fit together, `every_config.yaml` holds a type's own numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from peft_longlora.rope.values import SCALING

NUMBERS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
WINDOW, VOCABULARY, TEXT_TOKENS = 64, 160, 97  # tokens
MOST_LAYERS = 4

HIDDEN = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "emb_dim", "embedding_dim", "embedding_size")
HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"),
    *("num_sliding_attention_heads", "linear_num_heads", "index_n_heads"),
)
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "num_query_groups")
LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "depth", "encoder_layers", "decoder_layers"),
    *("num_encoder_layers", "num_decoder_layers", "num_blocks", "decoder_num_layers", "num_global_layers"),
)
# The others, by parts of the hidden size: an eighth of 64 is 8.
SMALL = {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "mlp_dim", "dff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dim_ff", "feed_forward_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "prompt_mid_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("moe_hidden_size", "share_expert_dim", "router_hidden_size"), 16),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_kv", "kv_channels", "linear_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("index_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_headdim", "d_head", "dim_head"), 16),
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "rotary_dim": 8,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank", "laurel_rank", "hc_lowrank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "zero_expert_num"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("linear_num_key_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "mamba_d_ssm": 128,
    "lru_width": 64,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), WINDOW),
    **dict.fromkeys(("original_max_position_embeddings", "floor_scale", "log_scaling_n_floor"), WINDOW),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "sliding_window_size", "attention_window_size"), 16),
    **dict.fromkeys(("local_attention",), 16),
    **dict.fromkeys(("index_topk", "index_block_size"), 8),
    **dict.fromkeys(("index_topk_blocks",), 2),
    "index_kpool": 4,
    "block_size": 16,
    **dict.fromkeys(("vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size_per_layer_input", "ple_embed_dim"), 8),
    **dict.fromkeys(("image_size",), 56),
    **dict.fromkeys(("type_vocab_size", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("num_position_embeddings",), 16),
}  # fmt: skip


def tiny_config(model_type: str, changes: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The config of a model of some ten thousand weights, which keeps one layer of each kind."""
    own = NUMBERS.get(model_type, {})
    default = AutoConfig.for_model(model_type, **own.get("default", {}))
    text = default.get_text_config(decoder=True)
    values = _lowered(default, is_text=text is default, text=text)
    values = _merged(_merged(values, own.get("default", {})), own.get("config", {}))
    of_text = values
    if text is not default:
        of_text = next((values[name] for name, value in vars(default).items() if value is text), values)
    of_text.update(changes or {})
    if changes and "sliding_window" in changes:
        of_text.pop("layer_types", None)
    return AutoConfig.for_model(model_type, **values)


def _merged(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    out = dict(values)
    for name, value in own.items():
        out[name] = (
            _merged(out.get(name) or {}, value) if isinstance(value, dict) and name.endswith("_config") else value
        )
    return out


def _lowered(config: PreTrainedConfig, *, is_text: bool, text: PreTrainedConfig) -> dict[str, Any]:
    hidden = 64 if is_text else 32
    heads = 4 if is_text else 2
    values: dict[str, Any] = {}
    stated = vars(config)
    widths = _widths(config, hidden) | (_widths(text, 64) if not is_text else {})
    chosen, count = _chosen_layers(config, stated)
    used_ids: dict[int, int] = {}
    for name, value in stated.items():
        if name.startswith("_") or name in ("transformers_version", "architectures", "dtype"):
            continue
        if isinstance(value, PreTrainedConfig):
            part = _lowered(value, is_text=value is text or is_text, text=text)
            values[name] = {"model_type": value.model_type, **part}
        elif name == "rope_parameters" and isinstance(value, dict) and value:
            values[name] = _plain_rope(value)
        elif value is None and name == "sliding_window":
            values[name] = None  # the default of the class may be another
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            values[name] = 0.0
        elif isinstance(value, list | tuple) and count and len(value) == count:
            kept = [value[i] for i in chosen]
            values[name] = [min(each, SMALL[name]) for each in kept] if name in SMALL else kept
        elif isinstance(value, list | tuple) and count and _is_list_of_layers(name, value, count):
            values[name] = [new for new, old in enumerate(chosen) if old in value]
        elif isinstance(value, int):
            small = _small(name, value, stated, hidden, heads, len(chosen), widths, used_ids)
            if small != value:
                values[name] = small
    return values


def _widths(config: PreTrainedConfig, hidden: int) -> dict[int, int]:
    return {getattr(config, name): hidden for name in reversed(HIDDEN) if isinstance(vars(config).get(name), int)}


def _is_list_of_layers(name: str, value: Any, count: int) -> bool:
    is_named = any(part in name for part in ("layer", "idxs", "index")) and "token" not in name
    return is_named and bool(value) and all(type(each) is int and 0 <= each < count for each in value)


def _plain_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """RoPE without a scaling: what the base of a LongLoRA adapter must have."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {k: _plain_rope(v) if isinstance(v, dict) else v for k, v in parameters.items()}
    kind = parameters.get("rope_type", "default")
    plain = {k: v for k, v in parameters.items() if k not in SCALING}
    if (section := plain.get("mrope_section")) is not None:
        plain["mrope_section"] = [2, 1, 1] if len(section) == 3 else [1] * len(section)
    return {"rope_type": kind if kind == "proportional" else "default", **plain}


def _chosen_layers(config: PreTrainedConfig, stated: dict[str, Any]) -> tuple[list[int], int]:
    """The indices of the layers to keep, one of each kind, at least two; and the number of layers of the config."""
    count = next((stated[n] for n in LAYERS if isinstance(stated.get(n), int)), 0)
    lists = [v for n, v in stated.items() if isinstance(v, list | tuple) and count > 2 and len(v) == count]
    lists = [v for v in lists if all(isinstance(each, str | bool | int) for each in v)]
    kinds: dict[Any, int] = {}
    for i in range(count):
        kinds.setdefault(tuple(v[i] for v in lists), i)
    chosen = list(kinds.values())[:MOST_LAYERS]
    for i in range(count):
        if len(chosen) >= min(2, count):
            break
        if i not in chosen:
            chosen.append(i)
    return sorted(chosen), count


def _small(
    name: str,
    value: int,
    stated: dict[str, Any],
    hidden: int,
    heads: int,
    layers: int,
    widths: dict[int, int],
    ids: dict,
) -> int:
    if name.endswith(("_token_id", "_token_index", "_id")) and not name.startswith(("num", "lang", "task")):
        if name.startswith(("pad", "bos", "eos", "sep", "decoder_start", "unk")):
            return {"pad": 0, "bos": 1, "eos": 2}.get(name[:3], 1)
        return ids.setdefault(value, TEXT_TOKENS + len(ids)) if value >= 0 else value
    if name == "vocab_size":
        return VOCABULARY
    if name in HIDDEN:
        return hidden
    if name in HEADS:
        return heads
    if name in KV_HEADS:
        of_all = next((stated[n] for n in HEADS if isinstance(stated.get(n), int)), value)
        return 1 if value == 1 else heads if value == of_all else heads // 2
    if name in LAYERS:
        return min(layers, value) if layers else min(2, value)
    if name == "head_dim" and value == stated.get("qk_rope_head_dim"):  # latent attention: of the rotary part
        name = "qk_rope_head_dim"
    if name in SMALL and value > 0:
        return min(value, SMALL[name])
    if value in widths and value > 64 and not name.startswith("max_"):
        return widths[value]
    return value


def tiny_model(
    model_type: str, kind: str = "causal", attention: str | None = None, changes: dict[str, Any] | None = None
) -> PreTrainedModel:
    """A tiny model with weights large enough that a wrong mask or a wrong rotation shows in the logits.

    Two calls give equal weights.
    """
    config = tiny_config(model_type, changes)
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForImageTextToText
    kind_of_model = auto._model_mapping.get(type(config), None)
    own_config = getattr(kind_of_model, "config_class", None)
    parts = [part for part in vars(config).values() if type(part) is own_config]
    settings = dict(dtype=torch.float32, attn_implementation=attention)
    if parts and own_config is not type(config):  # as a model of speech takes the config of its decoder
        model = kind_of_model._from_config(parts[0], **settings).eval()
    else:
        model = auto.from_config(config, **settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all():  # left empty by the model's class
                parameter.zero_()
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.15 if parameter.dim() > 1 else 0.1))
    return with_inputs(model, model_type)


def with_inputs(model: PreTrainedModel, model_type: str) -> PreTrainedModel:
    """The model, which gets what its processor would give it beside text."""
    inputs = NUMBERS.get(model_type, {}).get("inputs", {})

    def add(_module: Any, _args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs["input_ids"]
        missing = {name: number for name, number in inputs.items() if kwargs.get(name) is None}
        return (), {**kwargs, **{name: torch.full_like(ids, number) for name, number in missing.items()}}

    if inputs:  # PEFT calls the forward of the whole model, and no hooks of it
        model.base_model.register_forward_pre_hook(add, with_kwargs=True)
    return model

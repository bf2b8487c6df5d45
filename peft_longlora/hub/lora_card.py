"""The card of an exported plain LoRA adapter: how vLLM, TGI and LoRAX are started with it. `export` calls it."""

from __future__ import annotations

import copy
import json
import os
import shlex
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.hub.card import CardOptions, make_card
from peft_longlora.hub.markdown import literal, one_line
from peft_longlora.hub.readme import README, check_metadata, read_readme
from peft_longlora.hub.writing import write_whole

TEMPLATE = Path(__file__).parent / "templates" / "lora_card.md"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes (vllm/config/lora.py, 0.32)
NOT_IN_VLLM = ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora")


def write_lora_card(
    model: PeftModel, config: LongLoraConfig, folder: Path, fold_into: str | os.PathLike | None
) -> None:
    """Write the card of an exported adapter.

    Args:
        model: with the adapter that was exported. config: the adapter's.
        folder: of the exported adapter.
        fold_into: the folder of the base that was written for it, if any.
    """
    text_config = model.get_base_model().config.get_text_config()
    overrides = {
        name: value
        for name in ("rope_parameters", "max_position_embeddings")
        if (value := getattr(text_config, name, None)) is not None  # a model without positions may state no RoPE
    }
    base = one_line(config.base_model_name_or_path)
    rank = max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r
    config = copy.copy(config)
    config.card = CardOptions(template=TEMPLATE)
    extra: dict[str, Any] = {
        "folded": str(fold_into) if fold_into is not None else None,
        "overrides_shell": shlex.quote(json.dumps(overrides, sort_keys=True)),
        "not_in_vllm": _not_in_vllm(config, rank),
        "vllm_rank": next((allowed for allowed in VLLM_RANKS if allowed >= rank), None),
        "overrides_literal": repr(overrides),
        "base_literal": literal(base),
        "base_shell": shlex.quote(base),
        "name_shell": shlex.quote(one_line(folder.name)),
        "adapter_shell": shlex.quote(one_line(folder)),
    }
    check_metadata(old := read_readme(folder / README), folder / README)
    write_whole(folder / README, str(make_card(config, str(folder), extra=extra, old=old)))


def _not_in_vllm(config: LongLoraConfig, rank: int) -> str:
    """The settings of an adapter that vLLM refuses (vllm/lora/peft_helper.py, 0.32); empty if there are none."""
    found = [f"{name}={value!r}" for name in NOT_IN_VLLM if (value := getattr(config, name, None))]
    return ", ".join(found + ([f"r={rank}"] if rank > VLLM_RANKS[-1] else []))

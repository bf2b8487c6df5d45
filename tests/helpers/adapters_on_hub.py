"""Adapters of a tiny model on a hub: what tests do with them in another process (see tests/hub/conftest.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from huggingface_hub import ModelCard, hf_hub_download
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from peft_longlora import LongLoraConfig, use_longlora_card
from peft_longlora.hub.readme import BEGIN

TOKENS = torch.arange(3, 63).view(2, 30)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def new_adapter(**fields) -> PeftModel:
    model = LlamaForCausalLM.from_pretrained("me/base", attn_implementation="s2_attn")
    config = LongLoraConfig(**{"r": 2, "context_length": 256, "init_lora_weights": False, **fields})
    return get_peft_model(model, config)


def logits(model) -> list:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.tolist()


def push_private(repo_id):
    torch.manual_seed(2)
    model = new_adapter(rope_type="linear")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    use_longlora_card(model, datasets="me/books", language="en")
    model.push_to_hub(repo_id, private=True)
    return logits(model)


def run_card(repo_id):
    """What a reader of the card does: run its first code block as it stands."""
    code = CODE.search(Path(hf_hub_download(repo_id, "README.md")).read_text())[1]
    names = {}
    exec(code, names)
    return code, logits(names["model"])


def pull(repo_id, **kwargs):
    return logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("me/base"), repo_id, **kwargs))


def is_ours(content: bytes) -> bool:
    return BEGIN in content.decode() and "base_model:adapter:me/base" in ModelCard(content.decode()).data.tags


def push_with_card(repo_id, **kwargs):
    model = new_adapter()
    use_longlora_card(model)
    info = model.push_to_hub(repo_id, **kwargs)
    return info.oid


def changed_adapter(hub, **fields) -> dict[str, bytes]:
    files = hub.files("me/adapter")
    return {**files, "adapter_config.json": json.dumps({**json.loads(files["adapter_config.json"]), **fields}).encode()}

"""Adapters as the original project leaves them."""

import json

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict


def write_original(model: PeftModel, folder, pad_rows: int = 1) -> None:
    """The files that the original project's get_trainable_weights.py leaves, from a model of ours."""
    folder.mkdir()
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    lora = {key: tensor for key, tensor in state.items() if "lora" in key}
    whole = {key[17:]: tensor.clone() for key, tensor in state.items() if "lora" not in key}
    rows = whole["model.embed_tokens.weight"]
    whole["model.embed_tokens.weight"] = torch.cat([rows, rows.mean(0, keepdim=True).expand(pad_rows, -1)])
    torch.save(lora, folder / "adapter_model.bin")
    torch.save(whole, folder / "trainable_params.bin")
    config = {
        **{"auto_mapping": None, "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "bias": "none"},
        **{"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None},
        **{"layers_to_transform": None, "lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None},
        **{"peft_type": "LORA", "r": 2, "revision": None, "task_type": "CAUSAL_LM"},
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))

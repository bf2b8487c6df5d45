"""Tiny models and what is done with them: made, extended, trained, compared. Shared by tests of the lifecycle."""

import json

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_longlora import LongLoraConfig
from tests.helpers.configs import tiny_llama_config

EXPERTS = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, decoder_sparse_step=1
    ),
}
IDS = torch.randint(3, 97, (2, 96), generator=torch.Generator().manual_seed(3))


def make(model_type: str = "llama", dtype=torch.float32, **changes):
    """A tiny model with weights large enough that every wrong mask, rotation or tie shows."""
    if model_type == "llama":
        config = tiny_llama_config(**changes)
    else:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        tokens = ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
        common = {name: getattr(tiny_llama_config(), name) for name in sizes + tokens}
        config = AutoConfig.for_model(model_type, **{**common, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
        model.get_input_embeddings().weight.mul_(3)
    return model.to(dtype)


def extend(model, adapter_name: str = "default", **settings):
    return get_peft_model(model, LongLoraConfig(**{"r": 4, "context_length": 128, **settings}), adapter_name)


def train(model, steps: int = 2, lr: float = 0.02):
    """Plain training steps; every tensor that trains must have moved."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    return model.eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def snapshot(model) -> dict:
    """Everything that an adapter could have left behind on a base model."""
    return dict(
        tensors={n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        requires_grad={n: p.requires_grad for n, p in model.named_parameters()},
        types={n: type(m) for n, m in model.named_modules()},
        shapes={n: (m.in_features, m.out_features) for n, m in model.named_modules() if hasattr(m, "in_features")},
        attributes={
            n: sorted(k for k in vars(m) if not k.startswith("_"))
            for n, m in model.named_modules()
            if "RotaryE" in str(type(m))
        },
        settings=[n for n, m in model.named_modules() if hasattr(m, "s2_settings")],
        config=json.loads(model.config.to_json_string(use_diff=False)),
        attention=model.config._attn_implementation,
        hooks={n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in model.named_modules()},
        left_behind=sorted(name for name in vars(model) if "longlora" in name or "peft" in name),
        tied=model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        logits=logits(model),
    )


def assert_same(now: dict, before: dict, but: tuple[str, ...] = ()):
    for key in before.keys() - {*but, "tensors", "logits"}:
        assert now[key] == before[key], key
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert tensor.dtype == now["tensors"][name].dtype and torch.equal(tensor, now["tensors"][name]), name
    assert torch.equal(now["logits"], before["logits"])

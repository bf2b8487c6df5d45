"""A step of gpt_oss, of Gemma 4 and of hybrid models on a GPU, in bfloat16, against the definition in float32.

Run with `pytest -m gpu tests/whole/test_gpu_hybrids.py`. The layers of the hybrid that do not attend run on
flash-linear-attention's kernels if it is installed.
"""

import pytest
import torch
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from peft_longlora import configure_attention
from peft_longlora.reference import s2_attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]
G, WINDOW, LENGTHS = 256, 128, (700, 300, 1, 523)
SIZES = dict(vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0)
DEFAULT = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
DELTA = dict(linear_key_head_dim=64, linear_value_head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4)
TYPES = {
    "gpt_oss": dict(  # one expert, so that rounding cannot choose another
        **DEFAULT, num_local_experts=1, num_experts_per_tok=1, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "qwen3_5_text": {**DELTA, "layer_types": ["linear_attention", "full_attention"]},
    "gemma4_text": dict(  # heads that flash kernels do not take, and layers that reuse keys
        layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4, num_kv_shared_layers=2,
        sliding_window=WINDOW, global_head_dim=512, hidden_size_per_layer_input=16, vocab_size_per_layer_input=97,
    ),
    "granitemoehybrid": dict(  # without positions, as it is published
        layer_types=["mamba", "attention"], position_embedding_type="nope", num_local_experts=0,
        shared_intermediate_size=256, mamba_n_heads=8, mamba_d_head=64, mamba_d_state=16, mamba_chunk_size=64,
    ),
}  # fmt: skip
TYPES = {name: more for name, more in TYPES.items() if name in CONFIG_MAPPING}


def truth(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """The definition, for one document in a row."""
    how = dict(scaling=scaling, sinks=kwargs.get("s_aux"))
    if kwargs.get("sliding_window"):
        return s2_attention_reference(query, key, value, 2, pattern="full", window=WINDOW, **how), None
    return s2_attention_reference(query, key, value, G, **how), None


CASES = [(name, head_dim, None) for name in TYPES for head_dim in (64, 128) if name != "granitemoehybrid"]
CASES += [("gpt_oss", 64, "flex")]  # without a backend's name FlashAttention-4, if it is installed


def make(name: str, head_dim: int, dtype: torch.dtype, backend: str | None = None):
    AttentionInterface.register("truth_on_gpu", truth)
    AttentionMaskInterface.register("truth_on_gpu", sdpa_mask)
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **TYPES[name], "head_dim": head_dim})
    how = "truth_on_gpu" if dtype == torch.float32 else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=how).float()
    with torch.no_grad():
        for each, p in model.named_parameters():
            p.copy_((p + torch.randn_like(p) * 0.05).bfloat16())
            if name == "gemma4_text" and each.endswith("q_norm.weight"):  # which alone makes its scores small
                p.mul_(p.numel() ** -0.5)
    model = model.to("cuda", dtype).train()
    if dtype != torch.float32:
        configure_attention(model, group_size=G, backend=backend)
    return model


def step(model, calls):
    """Logits, and the gradients of their mean square: of one row, or of several calls."""
    outs = []
    for call in calls:
        logits = model(**call, use_cache=False).logits[0].float()
        (logits.square().sum() / sum(LENGTHS)).backward()
        outs.append(logits.detach())
    # Not of experts: transformers sums the gradients of their biases over the tokens in bfloat16.
    kept = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None and ".mlp." not in n}
    return {"logits": torch.cat(outs), **kept}


@pytest.mark.parametrize(("name", "head_dim", "backend"), CASES)
def test_a_packed_step_is_the_definition_of_each_document(name, head_dim, backend):
    ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1)).cuda()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()
    alone = [dict(input_ids=part) for part in ids.split(LENGTHS, dim=1)]
    wanted = step(make(name, head_dim, torch.float32), alone)
    half = name, head_dim, torch.bfloat16, backend
    found = step(make(*half), [dict(input_ids=ids, position_ids=positions)])
    whole = step(make(*half), [dict(input_ids=ids)])  # what it would be as one document
    assert found.keys() == wanted.keys()
    errors = {n: ((found[n] - x).norm() / x.norm().clamp(min=1e-6)).item() for n, x in wanted.items()}
    worst = max(errors, key=errors.get)
    leak = ((whole["logits"] - wanted["logits"]).norm() / wanted["logits"].norm()).item()
    print(
        name,
        head_dim,
        backend,
        f"logits {errors['logits']:.1e}, worst {worst} {errors[worst]:.1e}, as one row {leak:.1e}",
    )
    assert errors["logits"] < 0.03 and errors[worst] < 0.1
    assert leak > 3 * errors["logits"]
    if name == "gpt_oss":
        assert any("sinks" in n for n in errors)


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["qwen3_5_text", "granitemoehybrid"])
def test_a_packed_forward_of_a_hybrid_is_its_documents_alone(name, head_dim):
    """Forward only: flash-linear-attention 0.6 refuses its backward on Hopper with Triton 3.4 to 3.7.0."""
    ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1)).cuda()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()
    model = make(name, head_dim, torch.bfloat16)
    alone = torch.cat([model(input_ids=x, use_cache=False).logits for x in ids.split(LENGTHS, dim=1)], dim=1).float()
    packed, whole = (model(input_ids=ids, position_ids=x, use_cache=False).logits.float() for x in (positions, None))
    error, leak = (((x - alone).norm() / alone.norm()).item() for x in (packed, whole))
    print("forward", name, head_dim, f"logits {error:.1e}, as one row {leak:.1e}")
    assert error < 0.02 < leak / 3

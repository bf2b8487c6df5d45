"""Architectures in unusual shapes: the cases and their examination. (every_check.py examines every model type, in one
shape each.)

The truth of a supported architecture needs no file of this package but reference.py: the adapter is trained, merged and
saved, the folder is loaded by plain transformers with `truth_attention` as its attention, and must compute the same.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field

import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peft_longlora import LongLoraConfig
from peft_longlora.reference import s2_attention_reference

WINDOW, CONTEXT, GROUP = 64, 128, 16  # tokens
GPTJ_HAS_INTERFACE = Version(transformers.__version__) >= Version("5.24")


@dataclass(frozen=True)
class Case:
    """One tiny model.

    Attributes:
        name: of the case; also the model_type unless that is given.
        config: what differs from `tiny`.
        odd: what is unusual about it.
        local: indices of layers that have a window of their own.
        refused: a part of the message, where the architecture is refused.
        warns: a part of the warning, where S2-Attn changes nothing.
        norms: whether there are norms with weights to train.
        settings: of the LongLoraConfig, beside those of `examine`.
    """

    name: str
    config: dict = field(default_factory=dict)
    odd: str = ""
    local: tuple[int, ...] = ()
    refused: str = ""
    warns: str = ""
    model_type: str = ""
    norms: bool = True
    settings: dict = field(default_factory=dict)


NO_ROPE, NO_INTERFACE = "no rotary position embeddings", "does not take its attention from"
MOE = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1)
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=64, n_ctx=64, rotary_dim=8)
SLIDING = ["sliding_attention", "full_attention"]

CASES = [
    Case("llama", dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3), "9 query and 3 KV heads"),
    Case("mistral", dict(sliding_window=None, num_key_value_heads=1), "one KV head; without its sliding window"),
    Case(
        "mistral (window)",
        dict(sliding_window=48),
        "a sliding window in every layer",
        (0, 1),
        warns="S2-Attn changes no layer",
        model_type="mistral",
    ),
    Case("mixtral", {**MOE, "sliding_window": None}, "experts"),
    Case("ministral", dict(head_dim=16, sliding_window=16, layer_types=SLIDING), "sliding layers", (0,)),
    Case("qwen2", dict(tie_word_embeddings=True), "biases, tied embeddings"),
    Case("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 16}, "experts"),
    Case("qwen3", dict(tie_word_embeddings=True, head_dim=24), "q and k norms, tied embeddings"),
    Case("qwen3_moe", {**MOE, "head_dim": 16}, "experts, q and k norms"),
    Case("gemma", dict(num_key_value_heads=1, head_dim=16), "one KV head, tied embeddings"),
    Case("gemma2", dict(head_dim=16, sliding_window=16), "softcap", refused="softcap"),
    Case(
        "gemma3_text",
        dict(head_dim=16, sliding_window=16, layer_types=SLIDING),
        "nested rope_parameters, sliding layers, tied embeddings",
        (0,),
    ),
    Case("phi", dict(partial_rotary_factor=0.5), "half of each head rotary"),
    Case("phi3 (yarn)", {}, "longrope only", refused="must be one of ['longrope']", model_type="phi3"),
    Case("phi3", {}, "one q, k, v projection", settings=dict(rope_type="ntk")),
    Case("gpt_neox", dict(tie_word_embeddings=True), "a quarter of each head rotary, tied embed_in"),
    Case("olmo", {}, "norms without weights", norms=False),
    Case("olmo2", {}, "q and k norms after the layer"),
    Case("olmo3", dict(sliding_window=16, layer_types=SLIDING), "sliding layers", (0,)),
    Case("olmoe", MOE, "experts"),
    Case("starcoder2", dict(sliding_window=None), "biases, tied embeddings"),
    Case("smollm3", dict(no_rope_layers=[1, 0]), "a layer without RoPE"),
    Case("granite", {}, "its own scaling factors"),
    Case("granitemoe", MOE, "experts"),
    Case("cohere", dict(use_qk_norm=True), "interleaved rotary, q and k norms"),
    Case("cohere2", dict(sliding_window=16, layer_types=SLIDING), "sliding layers, a layer without RoPE", (0,)),
    Case("stablelm", dict(qk_layernorm=True), "a quarter of each head rotary, q and k norms a head"),
    Case("glm", dict(head_dim=16), "half of each head rotary"),
    Case("glm4", dict(head_dim=16), "half of each head rotary, four norms a layer"),
    Case("nemotron", {}, "half of each head rotary"),
    Case("exaone4", dict(sliding_window=16, layer_types=SLIDING), "sliding layers", (0,)),
    Case("ernie4_5", {}, "interleaved rotary"),
    Case("seed_oss", dict(head_dim=16, attention_dropout=0.0, residual_dropout=0.0), "biases"),
    Case("hunyuan_v1_dense", dict(head_dim=16), "q and k norms"),
    Case(
        "deepseek_v3",
        dict(
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=24,
            num_key_value_heads=4,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            **MOE,
        ),
        "latent attention, values wider than the rotary part",
    ),
    Case(
        "gpt_oss",
        dict(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e4), **MOE),
        "attention sinks, sliding layers",
        local=(0,),
    ),
    Case("gpt2", GPT2, "learned positions", refused=NO_ROPE),
    Case("opt", dict(word_embed_proj_dim=64, ffn_dim=48), "learned positions", refused=NO_ROPE),
    Case("gptj", GPT2, "its own rotary code", refused=NO_ROPE if GPTJ_HAS_INTERFACE else NO_INTERFACE),
    Case("falcon", {}, "its own attention code", refused=NO_INTERFACE),
    Case("bloom", dict(n_layer=2, n_head=4), "ALiBi", refused=NO_INTERFACE),
    Case("mpt", dict(d_model=64, n_heads=4, n_layers=2), "ALiBi", refused=NO_INTERFACE),
    Case("mamba", {}, "no attention", refused=NO_INTERFACE),
]


KINDS = {"LoRA": "lora_A", "embeddings": "embed", "norms": "norm"}


def build(case: Case) -> PreTrainedModel:
    """A model of the case with weights large enough that a wrong mask or a wrong rotation shows in the logits."""
    common = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = AutoConfig.for_model(case.model_type or case.name, **{**common, **case.config})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
        model.get_input_embeddings().weight.mul_(3)
    return model


class Truth:
    """An attention of the tests' own: the dense-mask definition, told what the batch holds rather than finding out."""

    segment_ids: torch.Tensor
    local: tuple[int, ...] = ()
    is_sparse = True


def truth_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    how = dict(segment_ids=Truth.segment_ids, scaling=scaling, sinks=kwargs.get("s_aux"))
    if Truth.is_sparse and module.layer_idx not in Truth.local:
        return s2_attention_reference(query, key, value, GROUP, **how), None
    if how["sinks"] is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    window = kwargs.get("sliding_window")
    return s2_attention_reference(query, key, value, 2, pattern="full", window=window, **how), None


AttentionInterface.register("truth", truth_attention)
AttentionMaskInterface.register("truth", sdpa_mask)


def batches() -> dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Inputs and what they hold: a padded batch, and documents packed into one row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 100), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 71:] = 0
    packed = torch.cat([torch.arange(70), torch.arange(9), torch.arange(21)])[None]
    documents = torch.tensor([1] * 70 + [2] * 9 + [3] * 21)[None]
    return {
        "padded": (dict(input_ids=ids, attention_mask=mask), mask),
        "packed": (dict(input_ids=ids[:1], position_ids=packed), documents),
    }


def logits(model, inputs, *, training=False) -> torch.Tensor:
    model.train(training)
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def distance(model, other, *, training, apart=False) -> float:
    """Largest difference between the logits of two models, as a share of their size, over all that is no padding.

    Args:
        apart: whether `other` gets packed documents one by one, because plain transformers may let them see each other.
    """
    worst = 0.0
    for inputs, segment_ids in batches().values():
        Truth.segment_ids = segment_ids
        a = logits(model, inputs, training=training)
        if apart and "position_ids" in inputs:
            documents = inputs["input_ids"].split(segment_ids.unique_consecutive(return_counts=True)[1].tolist(), 1)
            b = torch.cat([logits(other, dict(input_ids=one)) for one in documents], 1)
        else:
            b = logits(other, inputs)
        real = segment_ids > 0
        worst = max(worst, ((a - b)[real].abs().max() / b[real].std()).item())
    return worst


def train(model, steps: int = 2) -> list[float]:
    """Plain training steps on the padded batch. Returns the losses."""
    inputs = batches()["padded"][0]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def examine(case: Case) -> dict[str, object]:
    """Run one architecture through its whole life.

    Returns: `refused` with the message and `untouched`; or what was measured: `losses`, `trained` (kinds of modules),
    `without_gradient` (trained tensors whose gradient is 0 or not finite), `off_equal` (adapter switched off = base),
    `tied` against `was_tied`, and as shares of the logits' size `load_error` (saved and loaded), `sparse_error` (in
    training mode, against the definition), `dense_error` (in evaluation, against plain transformers) and
    `sparse_effect` (how much S2-Attn changes: what the errors would be if it did not run).
    """
    base = build(case)
    wanted = dict(input_ids=batches()["padded"][0]["input_ids"][:, :WINDOW])
    of_base = logits(base, wanted)
    config = LongLoraConfig(r=4, context_length=CONTEXT, group_size=GROUP, **case.settings)
    try:
        model = get_peft_model(base, config)
    except (NotImplementedError, ValueError) as error:
        return dict(refused=str(error), untouched=torch.equal(logits(base, wanted), of_base))
    try:
        losses = train(model)
    except NotImplementedError as error:  # of the kernels on this device
        model.unload()
        return dict(refused=str(error), untouched=torch.equal(logits(base, wanted), of_base), late=True)
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[str, object] = dict(
        losses=losses,
        without_gradient=[n for n, p in names.items() if p.grad is None or not 0 < p.grad.abs().max() < float("inf")],
        trained={kind: any(part in name for name in names) for kind, part in KINDS.items()},
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/adapter")
        loaded = PeftModel.from_pretrained(build(case), f"{folder}/adapter")
        found["load_error"] = distance(loaded, model.eval(), training=False)
        with model.disable_adapter():
            found["off_equal"] = torch.equal(logits(model, wanted), of_base)
        loaded.merge_and_unload().save_pretrained(f"{folder}/merged")
        merged, truth = (
            AutoModelForCausalLM.from_pretrained(f"{folder}/merged", attn_implementation=name)
            for name in ("sdpa" if base._supports_sdpa else "eager", "truth")
        )
    Truth.local = case.local
    found["sparse_error"] = distance(model, truth, training=True)
    found["dense_error"] = distance(model, merged, training=False, apart=True)
    found["sparse_effect"] = distance(merged, truth, training=False)
    found["tied"] = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    found["was_tied"] = base.config.get_text_config().tie_word_embeddings
    return found

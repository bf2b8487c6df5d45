"""Which modules an adapter trains, against lists written by hand for each architecture."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    Qwen3Config,
)

from peft_longlora.adapter.trainable import find_embeddings, find_norms, find_projections, named_modules, shorten
from tests.helpers.configs import tiny_llama_config

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GQA = dict(num_key_value_heads=2)
QKVO = ["k_proj", "o_proj", "q_proj", "v_proj"]
BEFORE_AFTER = ["input_layernorm", "post_attention_layernorm"]
QK_NORMS = ["q_norm", "k_norm"]

# name: (config, projections in each attention, embeddings, norms in each layer, other norms), by last part of the name
ARCHITECTURES = {
    "llama": (tiny_llama_config(), QKVO, "embed_tokens", BEFORE_AFTER, ["norm"]),
    "qwen3": (Qwen3Config(**SIZES, **GQA, head_dim=8), QKVO, "embed_tokens", BEFORE_AFTER + QK_NORMS, ["norm"]),
    "gemma3_text": (
        Gemma3TextConfig(**SIZES, **GQA, head_dim=8),
        QKVO,
        "embed_tokens",
        [*BEFORE_AFTER, *QK_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"],
        ["norm"],
    ),
    "gpt_neox": (GPTNeoXConfig(**SIZES), ["dense", "query_key_value"], "embed_in", BEFORE_AFTER, ["final_layer_norm"]),
    "phi3": (Phi3Config(**SIZES, **GQA), ["o_proj", "qkv_proj"], "embed_tokens", BEFORE_AFTER, ["norm"]),
    "mixtral": (
        MixtralConfig(**SIZES, **GQA, num_local_experts=2, num_experts_per_tok=1),
        QKVO,
        "embed_tokens",
        BEFORE_AFTER,
        ["norm"],
    ),
    "olmo2": (
        Olmo2Config(**SIZES, **GQA),
        QKVO,
        "embed_tokens",
        ["post_attention_layernorm", "post_feedforward_layernorm", *QK_NORMS],
        ["norm"],
    ),
    "olmo": (OlmoConfig(**SIZES, **GQA), QKVO, "embed_tokens", [], []),  # its norms have no weights
    "cohere": (CohereConfig(**SIZES, **GQA), QKVO, "embed_tokens", ["input_layernorm"], ["norm"]),
}


@pytest.fixture(params=ARCHITECTURES)
def case(request):
    config, *expected = ARCHITECTURES[request.param]
    return AutoModelForCausalLM.from_config(config), *expected


def last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def selected_by(model, suffixes) -> list[str]:
    """Full names that PEFT selects by `suffixes`, by its rule for modules_to_save: a plain `endswith`."""
    return [name for name, _ in model.named_modules() if any(name.endswith(suffix) for suffix in suffixes)]


def test_projections_are_those_of_every_attention_and_nothing_else(case):
    model, projections, *_ = case
    found = find_projections(model)
    assert found == sorted(projections)
    chosen = [n for n, _ in model.named_modules() if check_target_module_exists(LoraConfig(target_modules=found), n)]
    assert sorted(map(last, chosen)) == sorted(projections * 2)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in chosen)
    assert not [name for name in chosen if "mlp" in name or "lm_head" in name]


def test_embeddings_are_those_that_get_input_embeddings_returns(case):
    model, _, embeddings, *_ = case
    (name,) = find_embeddings(model)
    assert last(name) == embeddings
    assert model.get_submodule(name) is model.get_input_embeddings()


def test_norms_are_all_that_have_weights(case):
    model, *_, in_layers, others = case
    chosen = selected_by(model, find_norms(model))
    assert sorted(map(last, chosen)) == sorted(in_layers * 2 + others)
    assert all("Norm" in type(model.get_submodule(name)).__name__ for name in chosen)


def test_nothing_but_norms_has_small_weights_left(case):
    """Independent of names: in a Llama-like model, 1-D weights that are no bias belong to norms."""
    model, *_ = case
    chosen = selected_by(model, find_norms(model))
    one_dimensional = {n.rsplit(".", 1)[0] for n, p in model.named_parameters() if p.dim() == 1 and "bias" not in n}
    assert one_dimensional <= set(chosen)


def test_names_are_the_same_behind_an_adapter():
    """A second adapter is added to a model whose modules PEFT has wrapped already."""
    model = AutoModelForCausalLM.from_config(tiny_llama_config())
    before = find_projections(model), find_embeddings(model), find_norms(model)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "norm"])
    inner = get_peft_model(model, lora).get_base_model()
    assert (find_projections(inner), find_embeddings(inner), find_norms(inner)) == before


def test_named_modules_of_a_bare_model_are_torchs_own():
    model = AutoModelForCausalLM.from_config(tiny_llama_config())
    assert dict(named_modules(model)) == dict(model.named_modules())


def test_norms_are_found_by_type():
    """torch's own norms under any name, and any class called a norm; not what merely holds one."""

    class TidyRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    class NormedBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.ln, self.linear = TidyRMSNorm(), nn.LayerNorm(4), nn.Linear(4, 4)
            self.bare = nn.LayerNorm(4, elementwise_affine=False)

    model = nn.ModuleDict({"block": NormedBlock(), "group": nn.GroupNorm(2, 4)})
    assert selected_by(model, find_norms(model)) == ["block.first", "block.ln", "group"]


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        (["a.1.norm", "a.2.norm"], ["a.1.mlp"], ["norm"]),
        (["a.1.norm"], ["a.2.norm"], ["1.norm"]),
        (["a.norm"], ["a.q_norm"], ["a.norm"]),  # "norm" would select q_norm too
        (["norm"], ["a.norm"], ["norm"]),  # nothing shorter exists
        (["a.x", "b.x", "b.y"], ["c.y"], ["b.y", "x"]),
        ([], ["a"], []),
    ],
)
def test_shorten(names, others, expected):
    assert shorten(names, names + others) == expected

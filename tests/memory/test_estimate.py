"""What `longlora plan` expects, from a shape alone, against peaks and times that were measured on GPUs."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    MambaConfig,
)

from peft_longlora.memory.blocks import find_blocks
from peft_longlora.memory.estimate import SHAPES, Shape, Training, best_estimate, estimate, flops, longest
from peft_longlora.memory.plan import GIB, MEANS
from peft_longlora.memory.rates import MEASURED, seconds
from tests.helpers.every_config import tiny_config
from tests.helpers.paths import ROOT
from tests.helpers.tiny import IDS, extend, make

RESULTS = ROOT / "benchmarks" / "results"
WITHOUT_LIGER = ("half low rank", "attention kept")
OURS = ("liger", "memory filled", "as planned", "by hand")
FULL = ("liger, full", "liger, full by PyTorch")
# Parameters, as the models' makers count them.
PUBLISHED = {
    "llama-2-7b": 6.74e9,
    "llama-2-13b": 13.02e9,
    "llama-3.2-1b": 1.24e9,
    "llama-3.1-8b": 8.03e9,
    "llama-3.3-70b": 70.6e9,
}


def measured():
    """Each measured step: where, what it was, its options of `checkpoint_blocks`, its peak and its speed."""
    for file in [*sorted(RESULTS.glob("training_[178]*.json")), RESULTS / "training_32k_h100.json"]:
        data = json.loads(file.read_text())
        shape, about = SHAPES[data["about"]["shape"]], data["about"]
        for row in data["results"]:
            if row.get("seconds") and row["row"] in (*WITHOUT_LIGER, *FULL, *OURS):
                options = dict(free=0, keep_in_host=0) | (row.get("options") or options_of(row, shape.blocks))
                options["keep"] = options["keep"] if options["keep"] is not True else shape.blocks
                training = Training(
                    embeddings=not about.get("no_embeddings"),
                    four_bit=bool(about.get("four_bit")),
                    fused_loss=row["row"] not in WITHOUT_LIGER,
                )
                name = f"{file.stem} {row['row']} {row['length']}"
                yield pytest.param(about, shape, training, options, row, id=name)


def options_of(row: dict, blocks: int) -> dict:
    """Of results written before rows held their options."""
    free = row.get("free_blocks", 0)
    keeps = row.get("means", {}).get("keep", row["row"] != "half low rank")
    return dict(free=free, keep=blocks - free if keeps else 0, keep_in_host=0)


@pytest.mark.parametrize(("about", "shape", "training", "options", "row"), list(measured()))
def test_peak_and_seconds_are_the_measured_ones(about, shape, training, options, row):
    """Within what docs/performance.md says. Rates are those of Liger's kernels and of S2-Attn."""
    counts = {name: options[name] for name in ("free", "keep", "keep_in_host")}
    means = {name: options[name] for name in ("offload", "tile_tokens") if options.get(name)}
    plan = replace(estimate(shape, training, row["length"], 10**15, 10**15, means), **counts)
    assert plan.peak / GIB == pytest.approx(row["peak_gib"], rel=0.05)
    if row["row"] not in WITHOUT_LIGER:
        group = row["length"] if row["row"] in FULL else about.get("group_size", 8192)
        expected = seconds(shape, plan, group, gpu_of(about), training.four_bit)
        assert expected == pytest.approx(row["seconds"], rel=0.2 if row["row"] in FULL else 0.1)


def gpu_of(about: dict) -> str:
    """The name that rates have for the GPU of a result."""
    return next(name for name in ("H100", "H200") if name in about["device"])


def test_rates_are_rows_of_results():
    found = set()
    for about, shape, training, options, row in (each.values for each in measured()):
        means = tuple((name, options[name]) for name in ("offload", "tile_tokens") if options.get(name))
        work = options["free"], options["keep"] + options["keep_in_host"], means
        speed = row["length"], round(row["tokens_per_second"])
        if row["row"] not in FULL:
            found.add((gpu_of(about), shape, training.four_bit, about.get("group_size", 8192), *work, *speed))
    for rate in MEASURED:
        kind = rate.gpu, SHAPES[rate.shape], rate.four_bit, rate.group_size
        assert (*kind, rate.free, rate.keep, rate.means, rate.length, rate.tokens_per_second) in found


@pytest.mark.parametrize("name", SHAPES)
def test_work_is_that_of_six_flops_a_weight_less_the_frozen_third(name):
    """Forward and the gradient of the input are 4 FLOPs a weight; attention within one token is nothing."""
    shape = SHAPES[name]
    weights = shape.linear_weights + shape.table
    assert flops(shape, 1000, 2) == pytest.approx(4000 * weights, rel=1e-3)
    total = weights + (0 if shape.tied else shape.table)
    assert total == pytest.approx(PUBLISHED[name], rel=1e-2)


def test_a_longer_row_needs_more_and_the_longest_is_the_last_that_fits():
    shape, training, budget = SHAPES["llama-3.1-8b"], Training(four_bit=True), 24 * GIB
    most = longest(shape, training, budget, 96 * GIB)
    assert best_estimate(shape, training, most, budget, 96 * GIB).fits
    assert not best_estimate(shape, training, most + 1024, budget, 96 * GIB).fits
    assert longest(shape, Training(), budget, 96 * GIB) < most < longest(shape, training, 80 * GIB, 96 * GIB)
    assert longest(shape, Training(), 10 * GIB, 96 * GIB) == 0  # the weights alone do not fit
    assert longest(shape, replace(training, shards=4), budget, 96 * GIB) > most


def test_means_that_need_less_are_estimated_so():
    shape = SHAPES["llama-3.1-8b"]
    tokens = [estimate(shape, Training(), 10**5, 0, 0, means).token_bytes for means in MEANS]
    assert tokens[0] > tokens[1] > tokens[2] == tokens[3] == tokens[4]


@pytest.mark.parametrize("family", ["mistral3", "internvl", "qwen2_5_vl", "qwen3_vl_moe", "gemma3"])
def test_a_model_that_sees_images_is_tied_as_its_whole_config_says(family):
    """Text configs have a default of their own, or say nothing."""
    for tied in (True, False):
        config = tiny_config(family)
        config.tie_word_embeddings = tied
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        assert Shape.of(config).tied is tied
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("nemotron_h", {"linear_attention", "moe", "mlp"}),
        ("deepseek_v32", set()),  # "indexed_attention"
        ("qwen3_5", {"linear_attention"}),
        ("gemma3", set()),
        ("falcon_h1", {"hybrid"}),
    ],
)
def test_blocks_with_a_state_or_without_attention_are_counted(family, more):
    config = AutoConfig.for_model(family)
    kinds = config.get_text_config().layer_types
    assert Shape.of(config).states == sum(kind in more for kind in kinds)


def test_an_error_of_ours_is_not_taken_for_a_missing_size(monkeypatch):
    monkeypatch.setattr("peft_longlora.memory.estimate.count_weights", lambda *_: {}["a fault of this package"])
    with pytest.raises(KeyError, match="a fault of this package"):
        Shape.of(LlamaConfig())


def test_a_shape_is_read_from_a_config():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
    )
    assert Shape.of(config) == SHAPES["llama-3.1-8b"]
    with pytest.raises(ValueError, match="model_type='mamba': its config lacks a size of a decoder"):
        Shape.of(MambaConfig())
    with pytest.raises(ValueError, match=r"its config lacks a size of a decoder \(intermediate_size: None\)"):
        Shape.of(AutoConfig.for_model("gpt_neo"))
    # Experts of text and of images; feed-forward layers of different widths.
    for family, name in (("ernie4_5_vl_moe", "moe_intermediate_size"), ("gemma3n_text", "intermediate_size")):
        with pytest.raises(ValueError, match=rf"lacks a size of a decoder \({name}: several numbers\)"):
            Shape.of(AutoConfig.for_model(family))


def test_the_embeddings_gradient_comes_when_the_blocks_are_through():
    """And so it is not in the blocks' peak; test_embeddings.py compares the numbers with steps."""
    model, order = extend(make()), []
    table = next(p for n, p in model.named_parameters() if p.requires_grad and "embed_tokens" in n)
    table.register_post_accumulate_grad_hook(lambda _: order.append("table"))
    for number, block in enumerate(find_blocks(model)):
        first = next(p for p in block.parameters() if p.requires_grad)
        first.register_post_accumulate_grad_hook(lambda _, number=number: order.append(number))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert order == [1, 0, "table"]
    shape, counted = SHAPES["llama-3.1-8b"], 128256 * 4096 * 4
    once, summed = (
        estimate(shape, Training(keeps_gradients=stays), 2**17, 10**15, 10**15, MEANS[2]) for stays in (False, True)
    )
    assert summed.fixed - once.fixed == once.late == summed.late == counted
    short = replace(once, length=1, free=0, keep=0, keep_in_host=0)
    assert short.peak == short.fixed + counted and replace(short, budget=short.peak - 1).longest == 0

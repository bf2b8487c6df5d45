"""Embeddings and norms at a rate of their own, beside a plain loop with two groups of parameters."""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peft_longlora import LongLoraConfig
from peft_longlora.training import LearningRatesMixin
from peft_longlora.training.learning_rates import trains_whole
from tests.helpers.configs import tiny_llama_config

ROWS = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(0))


class RatesTrainer(LearningRatesMixin, Trainer):
    """A plain Trainer with a rate for embeddings and norms."""


def make(**config):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(max_position_embeddings=32))
    return get_peft_model(model, LongLoraConfig(r=4, context_length=64, **config))


def trainer(folder, model, rate=1e-3, **more):
    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=1, learning_rate=1e-2, weight_decay=0.1, use_cpu=True,
        train_sampling_strategy="sequential", report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = [dict(input_ids=row, labels=row) for row in ROWS]
    return RatesTrainer(model, arguments, train_dataset=rows, embedding_learning_rate=rate, **more)


def test_two_rates_are_those_of_a_plain_loop(tmp_path):
    found = trainer(tmp_path, make())
    found.train()

    model = make().train()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    groups = [
        dict(params=[one], lr=1e-2 if "lora_" in name else 1e-3, weight_decay=0.0 if "norm" in name else 0.1)
        for name, one in trained.items()
    ]
    assert any("embed_tokens" in name for name in trained) and any("norm" in name for name in trained)
    optimizer = torch.optim.AdamW(groups)
    starts = [group["lr"] for group in optimizer.param_groups]
    for step, row in enumerate(ROWS):
        for group, start in zip(optimizer.param_groups, starts, strict=True):
            group["lr"] = start * (4 - step) / 4  # the Trainer's linear decay
        model(input_ids=row[None], labels=row[None]).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = dict(found.model.named_parameters())
    for name, one in trained.items():
        torch.testing.assert_close(after[name], one, rtol=1e-4, atol=1e-6)
    rates = [entry["learning_rate"] for entry in found.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])  # LoRA's


@pytest.mark.parametrize("way", ["left out", "None", "by name"])
def test_the_optimizer_may_be_made_by_hand(tmp_path, way):
    found = trainer(tmp_path, make())
    args, kwargs = {"left out": ((), {}), "None": ((None,), {}), "by name": ((), dict(model=found.model))}[way]
    groups = found.create_optimizer(*args, **kwargs).param_groups
    whole = {one for name, one in found.model.named_parameters() if one.requires_grad and "lora_" not in name}
    assert {one for group in groups for one in group["params"] if group["lr"] == 1e-3} == whole


def test_a_rate_that_nothing_or_something_else_decides_is_refused(tmp_path):
    for wrong in (0, -1e-3, float("inf"), float("nan"), "1e-3", True):
        with pytest.raises(ValueError, match="must be a number above 0"):
            trainer(tmp_path, make(), rate=wrong)
    with pytest.raises(ValueError, match=r"has no effect: .*train_embeddings"):
        trainer(tmp_path, make(train_embeddings=False, train_norms=False))
    model = make()
    with pytest.raises(ValueError, match="given in `optimizers`"):
        trainer(tmp_path, model, optimizers=(torch.optim.AdamW(model.parameters()), None))
    trainer(tmp_path, make(train_embeddings=False, train_norms=False), rate=None).train()


def test_the_factors_of_a_learned_rope_are_trained_whole(tmp_path):
    fields = dict(rope_type="learned", train_embeddings=False, train_norms=False)
    assert trains_whole(LongLoraConfig(**fields)) and not trains_whole(
        LongLoraConfig(**{**fields, "rope_type": "yarn"})
    )
    found = trainer(tmp_path, make(**fields), rate=1e-9)
    found.train()
    factors = next(one for name, one in found.model.named_parameters() if name.endswith("default.stretch"))
    start = next(one for name, one in make(**fields).named_parameters() if name.endswith("default.stretch"))
    assert factors.requires_grad and (factors - start).abs().max() < 1e-7


def test_the_command_passes_it_on_and_goes_on_from_a_checkpoint(run, place):
    pytest.importorskip("trl", minversion="1.16")
    key = "--embedding-learning-rate"
    code, _, _, whole = run(key, 1e-9, "--lr-scheduler-type", "constant", out="whole")
    assert code == 0
    assert run(key, 1e-9, "--lr-scheduler-type", "constant", "--max-steps", 2, out="parts")[0] == 0
    assert run(key, 1e-9, "--lr-scheduler-type", "constant", out="parts")[0] == 0
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (whole, whole.parent / "parts"))
    base = load_file(place / "base" / "model.safetensors")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6)
        if "lora_" not in name:
            start = base[name.removeprefix("base_model.model.")]
            torch.testing.assert_close(tensor.float(), start.float(), rtol=0, atol=1e-6)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in ours.items() if "lora_B" in name)
    assert json.loads((whole / "trainer_state.json").read_text())["log_history"][0]["learning_rate"] == 1e-2
    for other in (1e-3, "null"):
        code, _, err, _ = run(key, other, "--lr-scheduler-type", "constant", out="parts")
        assert code == 2 and "holds a run with embedding_learning_rate=1e-09, and the recipe says" in err
    assert "learning rate 0.01 (1e-09 for what is trained whole), " in (whole / "README.md").read_text()
    code, _, err, _ = run(key, 1e-3, "--no-train-embeddings", "--no-train-norms", out="none")
    assert code == 2 and "embedding_learning_rate=0.001 has no effect" in err

"""Initialisations that take a part out of the base: which adapters can be loaded, and what is said of the others."""

import copy

import pytest
import torch
from peft import PeftModel

from peft_longlora import LongLoraConfig
from tests.helpers.tiny import extend, logits, make, train

PLAIN = dict(train_embeddings=False, train_norms=False)
# PEFT's names, apart from those that need a preprocessing or bitsandbytes
SAME_AGAIN = ["pissa", "olora", "eva", "orthogonal", "mica", "gaussian", True, False]


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("peft_longlora.adapter.fit.logger.warning", lines.append)
    return lines


@pytest.mark.parametrize("init", SAME_AGAIN, ids=str)
def test_the_loaded_adapter_computes_what_the_trained_one_did(init, said, tmp_path):
    model = extend(make(), init_lora_weights=init, **PLAIN)
    wanted = logits(model if init == "mica" else train(model))  # which trains half of its weights
    model.save_pretrained(tmp_path)
    base = make()
    torch.manual_seed(7)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), wanted, rtol=1e-4, atol=1e-4)
    assert not [line for line in said if "cannot be loaded" in line]


def test_one_of_random_numbers_is_really_another_one(tmp_path):
    """The reported case, as it would be loaded: the same weights on the base that another draw left."""
    model = extend(make(), init_lora_weights="pissa_niter_4", **PLAIN)
    wanted = logits(train(model))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    base = make()
    torch.manual_seed(7)
    other = extend(base, init_lora_weights="pissa_niter_4", **PLAIN)
    other.load_state_dict(trained, strict=False)
    assert (logits(other) - wanted).abs().max() > 0.01


@pytest.mark.parametrize(
    ("init", "why"),
    [
        ("pissa_niter_4", "with random numbers"),
        ("lora_ga", "with random numbers in the gradients of some data"),
        ("corda", "preprocess_corda computed of some data"),
    ],
)
def test_it_is_refused_with_the_reason_and_the_cure(init, why, said, tmp_path):
    extend(make(), **PLAIN).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{init}"'))
    base = make()
    wanted = logits(base)
    with pytest.raises(
        ValueError, match=rf"init_lora_weights='{init}', which .*{why}.*cannot be computed again.*merge"
    ):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), wanted)


def test_it_warns_once_when_it_is_made_and_can_be_saved_as_plain_lora(said, tmp_path):
    model = extend(make(), init_lora_weights="pissa_niter_4", **PLAIN)
    [line] = [line for line in said if "cannot be loaded" in line]
    assert all(cure in line for cure in ("merge_and_unload", "path_initial_model_for_weight_conversion", "='pissa'"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "init")
    model.peft_config["default"].init_lora_weights = "pissa_niter_4"
    wanted = logits(train(model))
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(make(), tmp_path / "out")), wanted, atol=1e-4, rtol=1e-4
    )
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-3, atol=1e-3)


def test_only_the_process_that_made_it_takes_its_checkpoints_back(tmp_path):
    """A Trainer loads its best checkpoint so at the end; and so does one that resumes, on a base of another draw."""
    fields = dict(init_lora_weights="pissa_niter_4", **PLAIN)
    model = train(extend(make(), **fields))
    model.save_pretrained(tmp_path)
    best = logits(model)
    train(model)
    assert not torch.allclose(logits(model), best, atol=1e-3)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(model), best)
    base = make()
    torch.manual_seed(7)
    resumed = extend(base, **fields)
    with pytest.raises(ValueError, match="cannot be computed again"):
        resumed.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("fields", [dict(lora_alpha=0), dict(alpha_pattern={"q_proj": 0.0})], ids=str)
def test_lora_times_zero_is_refused(fields):
    with pytest.raises(ValueError, match=r"multiplies what LoRA learns by 0, so it has no effect.*another number"):
        LongLoraConfig(**fields)

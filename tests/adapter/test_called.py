"""Projections whose layer reads their weight and does not call them: an adapter there would never be trained."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.models.bamba import modeling_bamba

from peft_longlora import LongLoraConfig
from tests.helpers.every_config import tiny_model
from tests.helpers.tiny import IDS, extend, make, train

TOKENS = torch.arange(3, 83).repeat(2, 1)


def steps(model, count=10):
    for _ in range(count):
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()


def adapted(model_type, *names):
    model = get_peft_model(
        tiny_model(model_type), LongLoraConfig(r=4, group_size=16, target_modules=["q_proj", *names])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


@torch.no_grad()
def test_what_is_refused_is_left_out_indeed():
    """Jamba multiplies by the weight of dt_proj: its adapter changes no logits, though it would change a merged one."""
    model = adapted("jamba", "dt_proj").eval()
    without = copy.deepcopy(model)
    for name, parameter in without.named_parameters():
        if "dt_proj.lora_B" in name:
            parameter.zero_()
    assert torch.equal(model(TOKENS).logits, without(TOKENS).logits)
    with pytest.raises(ValueError, match="does not compute what the adapter does"):
        model.merge_and_unload()


def test_a_projection_that_is_never_called_is_refused_in_training():
    model = adapted("jamba", "dt_proj").train()
    with pytest.raises(RuntimeError, match=r"layers\.0\.mamba\.dt_proj is left out.*exclude_modules=\['dt_proj'\]"):
        steps(model)
    with torch.no_grad():
        steps_without_gradients = [model.eval()(TOKENS) for _ in range(10)]
    assert len(steps_without_gradients) == 10
    excluded = LongLoraConfig(r=4, group_size=16, target_modules="all-linear", exclude_modules=["dt_proj"])
    steps(get_peft_model(tiny_model("jamba"), excluded).train())


def test_a_kernel_that_takes_the_weight_of_a_projection_is_seen(monkeypatch):
    """As mamba-ssm's, which computes a layer of Mamba as a whole while it trains, and only then."""
    model = adapted("bamba", "out_proj").train()
    steps(model)  # without the kernel it is called

    def kernel(x, *args, outproj_weight, rmsnorm_weight, **kwargs):
        return nn.functional.linear(x[..., : len(rmsnorm_weight)] * rmsnorm_weight, outproj_weight)

    monkeypatch.setattr(modeling_bamba, "mamba2_split_conv1d_scan_combined", kernel)
    with pytest.raises(RuntimeError, match=r"mamba\.out_proj is left out and would never be trained"):
        steps(model)
    steps(adapted("bamba").train())


def test_reading_a_weight_beside_calling_it_is_nothing():
    model = extend(make(dtype=torch.bfloat16))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj

    def read(*_):
        return [layer.weight.dtype for _ in range(3)] and None

    layer.register_forward_pre_hook(read)
    layer.register_forward_hook(read)
    train(model, steps=5)
    assert layer.weight is layer.base_layer.weight
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(extend(make())))):
        assert twin(input_ids=IDS).logits.isfinite().all()


def test_who_looks_at_weights_between_steps_is_free_to():
    model = extend(make()).train()
    for _ in range(20):
        for module in model.modules():
            getattr(module, "weight", None)
    steps(model, 2)

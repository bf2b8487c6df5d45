"""An adapter that changes the base itself: none beside it, and a warning that the base does not come back."""

import pytest
import torch
from peft.tuners.lora.config import KasaConfig

from peft_longlora import LongLoraConfig
from tests.helpers.tiny import assert_same, extend, logits, make, snapshot

CHANGES = {
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights='pissa' changes the base's weights"),
    "olora": (dict(init_lora_weights="olora"), "init_lora_weights='olora' changes the base's weights"),
    "kasa": (dict(kasa_config=KasaConfig()), "kasa_config drops the least singular values of the base's weights"),
    "bias": (dict(bias="lora_only", train_norms=False), "bias='lora_only' trains the base's own biases"),
    "layers": (dict(layer_replication=[[0, 2], [1, 2]]), r"layer_replication=.* changes the base's layers"),
}


@pytest.mark.parametrize("is_first", [True, False], ids=["it comes first", "it comes second"])
@pytest.mark.parametrize("name", CHANGES)
def test_it_stands_alone_in_either_order(name, is_first):
    fields, what = CHANGES[name]
    first, second = (fields, {}) if is_first else ({}, fields)
    model = extend(make(), "first", **first)
    before, wanted = snapshot(model), logits(model)
    changing, other = ("first", "second") if is_first else ("second", "first")
    with pytest.raises(ValueError, match=rf"Adapter '{changing}': {what}, on which \['{other}'\] build.*own model"):
        model.add_adapter("second", LongLoraConfig(r=4, context_length=128, **second))
    assert list(model.peft_config) == ["first"]
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), wanted)


def test_one_config_for_two_adapters_does_not_decompose_the_weights_twice():
    model = extend(make(), init_lora_weights="pissa")
    wanted = logits(model)
    with pytest.raises(ValueError, match=r"Adapter 'ref': .* on which \['default'\] build"):
        model.add_adapter("ref", model.peft_config["default"])
    assert torch.equal(logits(model), wanted)


def test_a_saved_adapter_is_not_loaded_beside_it(tmp_path):
    extend(make()).save_pretrained(tmp_path)
    model = extend(make(), init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"Adapter 'default': .* on which \['saved'\] build"):
        model.load_adapter(tmp_path, "saved")


@pytest.mark.parametrize("name", CHANGES)
def test_it_warns_that_the_base_does_not_come_back(name, monkeypatch):
    fields, what = CHANGES[name]
    said = []
    monkeypatch.setattr("peft_longlora.adapter.fit.logger.warning", said.append)
    model = extend(make(), **fields)
    assert [line for line in said if "disable_adapter(), unload()" in line and what.split("=")[0] in line]
    if name == "layers":  # and it is true
        assert len(make().model.layers) == 2 and len(model.unload().model.layers) == 3


def test_plain_lora_says_nothing(monkeypatch):
    said = []
    monkeypatch.setattr("peft_longlora.adapter.fit.logger.warning", said.append)
    extend(make())
    assert not said

"""Registration: what a user has before and after `import peft_longlora`, and how the new enum member behaves."""

import copy
import gc
import json
import pickle

import pytest
from peft import PeftType, get_peft_model, inject_adapter_in_model
from torch.nn.modules import module

from peft_longlora import LongLoraConfig, LongLoraModel, register
from peft_longlora.hub.card import write_cards_of_save
from peft_longlora.hub.methods import give_methods


def test_without_the_import_a_user_sees_a_key_error(fresh_process):
    config, model, attention = fresh_process["without"]
    assert config == model == "KeyError('LONGLORA')"
    assert '`attn_implementation="s2_attn"` is not supported' in attention


def test_the_import_registers_config_model_and_prefix(fresh_process):
    assert fresh_process["registered"] == ["LongLoraConfig", "LongLoraModel", "lora_"]
    assert fresh_process["new_members"] == ["LONGLORA"]
    assert fresh_process["loaded"] == ["LongLoraConfig", 256]


def test_a_second_import_or_call_changes_nothing(fresh_process):
    assert fresh_process["second_time_changes_nothing"]


def test_nothing_else_is_patched(fresh_process):
    assert fresh_process["nothing_patched"]


def test_the_import_gives_no_warning(fresh_process):
    assert fresh_process["warnings"] == []


def test_the_import_asks_for_no_extra_and_starts_no_cuda(fresh_process):
    assert fresh_process["asked_for"] == []
    assert fresh_process["heavy_modules"] == []
    assert fresh_process["cuda_calls"] == [] and not fresh_process["cuda_initialised"]


def test_a_member_pickled_in_one_process_is_the_member_in_another(fresh_process):
    assert pickle.loads(bytes.fromhex(fresh_process["pickled_elsewhere"])) is PeftType.LONGLORA


def test_the_member_is_found_in_every_way_an_enum_has():
    member = PeftType.LONGLORA
    assert PeftType("LONGLORA") is PeftType["LONGLORA"] is member
    assert member in PeftType and member in list(PeftType) and "LONGLORA" in PeftType.__members__
    assert list(PeftType).count(member) == 1 and len(PeftType) == len(PeftType.__members__)
    assert list(PeftType)[-1] is member and next(reversed(PeftType)) is member
    assert isinstance(member, PeftType) and isinstance(member, str) and type(member) is PeftType


def test_the_member_behaves_as_its_neighbours_do():
    member, neighbour = PeftType.LONGLORA, PeftType.LORA
    assert (member.name, member.value) == ("LONGLORA", "LONGLORA")
    assert member == "LONGLORA" and member != neighbour and hash(member) == hash("LONGLORA")
    assert {member: 1}["LONGLORA"] == 1
    assert repr(member) == repr(neighbour).replace("LORA", "LONGLORA")
    assert str(member) == str(neighbour).replace("LORA", "LONGLORA")
    assert json.dumps({"peft_type": member}) == '{"peft_type": "LONGLORA"}'
    assert copy.deepcopy(member) is copy.copy(member) is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member


def test_the_enum_is_as_closed_as_before():
    with pytest.raises(ValueError, match="'LONGERLORA' is not a valid PeftType"):
        PeftType("LONGERLORA")
    with pytest.raises(AttributeError):
        PeftType.LONGLORA = "other"
    assert PeftType.LORA.value == "LORA" and PeftType("LORA") is PeftType.LORA


def test_the_public_names_are_those_registered():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LONGLORA] is LongLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LONGLORA] is LongLoraModel


@pytest.mark.parametrize("make", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_no_hook_of_the_whole_process_stays(llama, make):
    """torch is asked which module takes the tuner, for the one step in which it does."""
    make(llama, LongLoraConfig(r=2))
    gc.collect()
    assert not module._global_module_registration_hooks


def test_the_card_is_handed_in():
    """`adapter/` stands below `hub/` and does not know what is called at a save."""
    assert LongLoraConfig.on_save is write_cards_of_save and LongLoraModel.on_made is give_methods

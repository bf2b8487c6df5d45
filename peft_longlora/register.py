"""Registers "LONGLORA" with peft, "s2_attn" with transformers, and the card's writer with the adapter.

It is idempotent, and the only place that changes registries.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers import AttentionInterface, AttentionMaskInterface

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.model import LongLoraModel
from peft_longlora.attention.forward import s2_attention_forward
from peft_longlora.attention.mask import s2_mask
from peft_longlora.attention.settings import S2_ATTN
from peft_longlora.hub.card import write_cards_of_save
from peft_longlora.hub.methods import give_methods

NAME = "LONGLORA"


def register_peft_type() -> None:
    """Add a member to peft's closed `PeftType` enum, unless peft has it already.

    `register_peft_method` accepts only names of this enum, and saved configs are looked up in it. The steps are those
    of `enum.EnumType` for a str member. `type.__setattr__` is used because the enum's own refuses new members.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)


def register() -> None:
    """Register the PEFT method, the attention and its mask, and the card. A second call changes nothing."""
    register_peft_type()
    if PeftType(NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=LongLoraConfig, model_cls=LongLoraModel, prefix="lora_")
    AttentionInterface.register(S2_ATTN, s2_attention_forward)
    AttentionMaskInterface.register(S2_ATTN, s2_mask)
    LongLoraConfig.on_save = write_cards_of_save
    LongLoraModel.on_made = give_methods

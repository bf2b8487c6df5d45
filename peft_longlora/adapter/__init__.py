"""What an adapter is, and what it does to a model: a config and a tuner, as in PEFT's own folder of a method.

Read `config` and `model`. `files` reads adapters, `fit` checks them, `state` undoes them. `trainable`, `copies` and
`precision` handle embeddings and norms; `lowrank` computes LoRA's product. Nothing here knows of cards or of pushing:
`register` passes those functions in.
"""

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.model import LongLoraModel

__all__ = ["LongLoraConfig", "LongLoraModel"]

"""What an adapter is, and what it does to a model: a config and a tuner, as in PEFT's own folder of a method.

Read `config`, `model` (how an adapter is added) and `ending` (how it is switched, merged and removed). `files` reads
adapters, `fit` and `patterns` check them, `state` undoes them. `trainable`, `copies` and `precision` handle embeddings
and norms; `lowrank` computes LoRA's product, `merged` keeps the base's weights during a merge, `probe` compares models.
Nothing here knows of cards or of pushing: `register` passes those functions in.
"""

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.model import LongLoraModel

__all__ = ["LongLoraConfig", "LongLoraModel"]

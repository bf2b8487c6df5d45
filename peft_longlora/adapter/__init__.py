"""What an adapter is, and what it does to a model: PEFT's config and tuner, as in PEFT's own folders of one method.

Read `config` and `model`. `files` reads adapters, `fit` checks them, `state` undoes them; `trainable`, `copies` and
`precision` are about embeddings and norms, `lowrank` about LoRA's product. Nothing here knows of cards or of the Hub's
repositories: `register` hands those in.
"""

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.model import LongLoraModel

__all__ = ["LongLoraConfig", "LongLoraModel"]

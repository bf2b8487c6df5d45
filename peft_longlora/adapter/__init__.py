"""What an adapter is, and what it does to a model: a config and a tuner, as in PEFT's own folder of a method.

Read `config`, `model` (how an adapter is added) and `ending` (how it is switched, merged and removed).

    config       its fields are checked by `rules` (each by itself), `consistency` (together), `filled_in` (those that
                 the package fills in) and `variants` (the options of LoRA's variants)
    model        `files` reads an adapter; `fit` checks that it fits its model, with `base` (is this the base that it
                 was made for?), `regexes`, `inits` (does LoRA start again as it did?) and `wishes` (do all adapters
                 want one RoPE and one attention?); `again` checks weights that are loaded over an adapter that is
                 there; `trainable` finds the modules to train, and `names` says which names of a config match none;
                 `count` saves the number of training forwards
    layers       `copies` and `precision` handle the copies of embeddings and norms, `lowrank` LoRA's product,
                 and `called` sees that an adapted projection is called at all
    ending       `state` undoes what adapters changed, `merged` keeps the base's weights during a merge, `mixed` handles
                 batches of several adapters, `probe` compares models

Nothing here knows of cards or of pushing: `register` passes those functions in.
"""

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.model import LongLoraModel

__all__ = ["LongLoraConfig", "LongLoraModel"]

"""The files beside an adapter's weights, and how adapters are pushed, loaded and converted.

    card         writes README.md: `readme` finds out who wrote the old one, `markdown` escapes text
    results      reads and writes results.json, and `provenance` says whether it is of these weights
    push         a model goes to the Hub, with `folder` a folder, with `trainers` a Trainer's saves, on a `draft` of
                 what is there; `base` is what the push says of the base, `methods` are those that a model gets for this
    loading      a base with an adapter, and `generation` says how it generates
    export       our adapters become plain LoRA, with a card of their own (`lora_card`); `original` makes the original
                 project's adapters ours: `original_fields` carries their config over, `original_tensors` checks them

`writing` writes a file completely or not at all.
"""

from peft_longlora.hub.export import export_lora
from peft_longlora.hub.folder import Pushed, push_folder
from peft_longlora.hub.loading import Loaded, load_model
from peft_longlora.hub.original import convert_original_adapter
from peft_longlora.hub.push import push_adapter, push_card
from peft_longlora.hub.results import Results
from peft_longlora.hub.trainers import use_longlora_card

__all__ = [
    "Loaded",
    "Pushed",
    "Results",
    "convert_original_adapter",
    "export_lora",
    "load_model",
    "push_adapter",
    "push_card",
    "push_folder",
    "use_longlora_card",
]

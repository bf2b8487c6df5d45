"""What lies beside an adapter's weights, and their way out and back.

`card` writes README.md (`readme` knows whose the old one is, `markdown` keeps other people's text text), `results`
reads and writes results.json, `push` and `trainers` bring both to the Hub, `loading` loads a base with an adapter,
`export` and `original` turn our adapters into plain LoRA and the original project's into ours.
"""

from peft_longlora.hub.export import export_lora
from peft_longlora.hub.loading import Loaded, load_model
from peft_longlora.hub.original import convert_original_adapter
from peft_longlora.hub.push import push_adapter, push_card
from peft_longlora.hub.results import Results
from peft_longlora.hub.trainers import use_longlora_card

__all__ = [
    "Loaded",
    "Results",
    "convert_original_adapter",
    "export_lora",
    "load_model",
    "push_adapter",
    "push_card",
    "use_longlora_card",
]

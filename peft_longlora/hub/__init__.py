"""What lies beside an adapter's weights, and their way out and back: card, results, push, loading, export."""

from peft_longlora.hub.export import export_lora
from peft_longlora.hub.loading import Loaded, load_model
from peft_longlora.hub.original import convert_original_adapter
from peft_longlora.hub.trainers import push_adapter, push_card, use_longlora_card

__all__ = [
    "Loaded",
    "convert_original_adapter",
    "export_lora",
    "load_model",
    "push_adapter",
    "push_card",
    "use_longlora_card",
]

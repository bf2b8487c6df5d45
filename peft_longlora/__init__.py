"""LongLoRA for any rotary causal language model of transformers, as an ordinary PEFT adapter.

The data path, which is also the reading order:

    input_ids -> transformers model
      -> attention/mask.py      once a forward: which tokens are padding, which belong to which document
      -> attention/forward.py   each layer: sparse while training, dense otherwise (attention/settings.py says how)
      -> kernels/groups.py      where the groups start
      -> kernels/attend.py      s2_attention and its backends; reference.py is the definition of correct
      -> loss                   the Trainer's
      -> adapter/model.py       what an adapter trains and saves (adapter/config.py says what)
      -> rope/scale.py          the longer window
      -> hub/card.py            its README; hub/push.py pushes both to the Hub

Around them: sequence/ shares a long row among GPUs, memory/ makes it fit, data/ reads training data, eval/ measures
what a window is worth, chat/ answers questions about a document, cli/ is the command `longlora`.

Importing this package registers `LongLoraConfig` with peft and "s2_attn" with transformers (register.py).
"""

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.model import LongLoraModel
from peft_longlora.attention.configure import configure_attention
from peft_longlora.attention.mode import use_attention
from peft_longlora.attention.reach import far_layers
from peft_longlora.hub.export import export_lora
from peft_longlora.hub.original import convert_original_adapter
from peft_longlora.hub.push import push_adapter
from peft_longlora.hub.trainers import use_longlora_card
from peft_longlora.kernels.attend import s2_attention
from peft_longlora.register import register
from peft_longlora.rope.scale import restore_rope, scale_rope

register()

__version__ = "0.1.0"
__all__ = [
    "LongLoraConfig",
    "LongLoraModel",
    "configure_attention",
    "convert_original_adapter",
    "export_lora",
    "far_layers",
    "push_adapter",
    "restore_rope",
    "s2_attention",
    "scale_rope",
    "use_attention",
    "use_longlora_card",
]

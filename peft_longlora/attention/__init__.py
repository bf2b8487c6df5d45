"""What transformers calls: the mask once a forward, then every attention layer, sparse or dense.

Read `mask`, `forward`, `dense`; `settings` and `configure` say which layers attend how, `inputs` what the model was
called with. `states` keeps documents apart in layers that do not attend. `reach` measures how far each layer attends.
"""

from peft_longlora.attention.configure import configure_attention, use_attention
from peft_longlora.attention.forward import s2_attention_forward
from peft_longlora.attention.mask import s2_mask
from peft_longlora.attention.reach import far_layers

__all__ = ["configure_attention", "far_layers", "s2_attention_forward", "s2_mask", "use_attention"]

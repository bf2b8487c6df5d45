"""What transformers calls: the mask once a forward, then every attention layer, sparse or dense.

Read `mask`, `forward`, `layer` and `dense`, which run in this order.

    settings     how the layers of a model attend: `configure` puts them on it (`effect` refuses idle ones, `trial` runs
                 a few tokens), `mode` changes them for a block of code, `schedule` makes one training forward in n
                 dense, `skips` lets positions skip inside groups
    inputs       what the model was called with: `lengths` checks it, `axes` reads positions of several axes, `pending`
                 keeps it until the backward
    mask         `ready` answers what models ask of a mask, `caution` warns where packed rows are not computed as their
                 documents alone
    layer        `local` is a window that a layer has of its own, `states` keeps documents apart in layers that do not
                 attend

`reach` measures how far each layer attends.
"""

from peft_longlora.attention.configure import configure_attention
from peft_longlora.attention.forward import s2_attention_forward
from peft_longlora.attention.mask import s2_mask
from peft_longlora.attention.mode import use_attention
from peft_longlora.attention.reach import far_layers

__all__ = ["configure_attention", "far_layers", "s2_attention_forward", "s2_mask", "use_attention"]

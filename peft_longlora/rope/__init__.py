"""A longer window: RoPE is rescaled in place on a loaded model, and can be put back.

Read `parameters` (which RoPE parameters are valid) with `values` (which values they may have), then `state` (everything
that belongs to the RoPE of one model), then `scale` with `named` (what the name of a scaling means) and `absent`
(models that have no positions to rescale), then `learned` (a trained factor for each frequency). `mixing` gives one
module a class of ours; `adapter/` and `memory/` use it too. The room imports only `architecture` and `few_tokens`.
"""

from peft_longlora.rope.scale import restore_rope, scale_rope

__all__ = ["restore_rope", "scale_rope"]

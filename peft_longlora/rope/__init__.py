"""A longer window: RoPE is rescaled in place on a loaded model, and can be put back.

Read `parameters` (which RoPE parameters are valid) with `values` (which values they may have), then `state` (everything
that belongs to the RoPE of one model), then `scale`, then `learned` (a trained factor for each frequency). The room
imports only `architecture`, and `mixing` for a class of its own.
"""

from peft_longlora.rope.scale import restore_rope, scale_rope

__all__ = ["restore_rope", "scale_rope"]

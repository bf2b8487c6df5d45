"""A longer window: which RoPE parameters are valid, what a model's RoPE is made of, and how it is rescaled in place.

Read `parameters`, then `state`, then `scale`. Imports `architecture` alone.
"""

from peft_longlora.rope.scale import restore_rope, scale_rope

__all__ = ["restore_rope", "scale_rope"]

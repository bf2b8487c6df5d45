"""S2-Attn as a function of tensors: where groups start, which kernel runs a call, and the kernels themselves.

Read `groups`, `cuts`, `attend`, `backends`, `operators`, `launches`, `kernel`, then any kernel. The room knows torch,
but no models, and imports nothing of the package.
"""

from peft_longlora.kernels.attend import s2_attention

__all__ = ["s2_attention"]

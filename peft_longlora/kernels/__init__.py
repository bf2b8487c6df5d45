"""S2-Attn as a function of tensors: where groups start, which kernel runs a call, and the kernels themselves.

Read `patterns`, `groups`, `cuts`, `attend`, `backends`, `operators`, `launches`, `kernel`, then any kernel: those of
`flash` and `aten` run in the operators, `sdpa` (with `sdpa_call`) and `flex` are backends of their own. `sinks` adds
attention sinks to them. `blocks`, with `flash_blocks`, is for the patterns in which queries see blocks of keys. The
room knows torch, but no models, and imports nothing of the package.
"""

from peft_longlora.kernels.attend import s2_attention

__all__ = ["s2_attention"]

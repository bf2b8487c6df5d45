"""What fits into a GPU's memory, and how to make a step fit: which blocks are computed twice, and what they keep.

Read `blocks`, `keep`, `offload`, `places` (tensors in the host's memory), `tile` and `liger`, which are the means. Then
`plan`, the formula of memory, and who fills it with numbers: `fit` measures them (`peaks` computes a step, `host` is
what the host lends, `fragments` what the allocator loses), `estimate` and `rates` compute them from a shape (`sizes`
checks its config, `weights` counts what its model holds). `advice` comes last. Imports `attention`, `rope.mixing` and
`architecture`.
"""

from peft_longlora.memory.advice import explain_out_of_memory
from peft_longlora.memory.blocks import checkpoint_blocks
from peft_longlora.memory.fit import fit_memory
from peft_longlora.memory.keep import keep_attention
from peft_longlora.memory.plan import MemoryPlan

__all__ = ["MemoryPlan", "checkpoint_blocks", "explain_out_of_memory", "fit_memory", "keep_attention"]

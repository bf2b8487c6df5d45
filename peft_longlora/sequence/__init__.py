"""Sequence parallelism: the ranks of a mesh share each sequence.

Read `switch`, `batch`, `trainer`. Then follow a layer: `layer`, `edges`, and `halo` (sparse), `ulysses` (dense) or
`window`.
"""

from peft_longlora.sequence.batch import shard_batch
from peft_longlora.sequence.switch import parallelize_sequence, unshared
from peft_longlora.sequence.trainer import SequenceParallelMixin

__all__ = ["SequenceParallelMixin", "parallelize_sequence", "shard_batch", "unshared"]

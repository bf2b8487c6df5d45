"""What transformers and its models ask of a mask that they take as ready, and what `S2Mask` answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ALL = slice(None)


class ReadyMask:
    """A mask for all layers of a kind, which layers read instead of its S x S numbers.

    Attributes:
        batch, length: B and S, tokens.
        arguments: of transformers' mask functions.
        ndim: transformers takes a mask that is not 2-D as ready.
    """

    batch: int
    length: int
    arguments: dict[str, Any]
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, 1, S, T); transformers asks for it where a model hands the mask on to a model inside it."""
        return self.batch, 1, self.length, self.arguments["kv_length"]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"This architecture asks its attention mask for {name!r}: it computes with the mask itself, which S2-Attn "
            f"does not support. Load it with attn_implementation='sdpa'."
        )

    def __getitem__(self, index: Any) -> ReadyMask | LastQueries:
        """The mask of the last queries, for layers that reuse the keys of earlier ones (Gemma 4).

        Raises: TypeError: another part of the mask is asked for.
        """
        is_last = isinstance(index, tuple) and len(index) == 4 and (*index[:2], index[3]) == (ALL, ALL, ALL)
        queries = range(self.length)[index[2]] if is_last and isinstance(index[2], slice) else ()
        if not queries or queries != range(queries[0], self.length):
            raise TypeError(
                f"This architecture takes the part {index!r} of its attention mask: it computes with the mask itself, "
                f"which S2-Attn does not support. Load it with attn_implementation='sdpa'."
            )
        return self if len(queries) == self.length else LastQueries(self, len(queries))

    def to(self, *args: Any, **kwargs: Any) -> ReadyMask:
        """Returns itself: accelerate's hooks move the arguments of layers, and each layer moves the tensors it
        needs."""
        return self

    def contiguous(self) -> ReadyMask:
        """Returns itself: `generate` calls this on masks that it makes ahead for static caches."""
        return self


@dataclass(frozen=True)
class LastQueries:
    """The last `count` queries of a mask.

    They are computed as if all were there, because groups and documents belong to whole rows.
    """

    whole: ReadyMask
    count: int

    def to(self, *args: Any, **kwargs: Any) -> LastQueries:
        """Returns itself, as `ReadyMask.to`."""
        return self

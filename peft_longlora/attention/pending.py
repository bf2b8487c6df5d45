"""Forwards whose backward may come, and which of them a layer is recomputed for.

Gradient checkpointing computes a layer again in the backward, and gives it its arguments again. A layer with a state
along the sequence gets no argument that knows the documents of its row. But autograd numbers the nodes of its graph as
it makes them, and recomputation happens while one of these nodes runs. So the node's number tells the forward.
`states` asks here; `inputs` says where a forward begins and ends.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

KEPT_IN_GRAPH = "peft_longlora: forward"


@dataclasses.dataclass(eq=False)
class Forward:
    """What recomputation must know of one forward of a model.

    Attributes:
        plan: the documents apart, or None if the layers got the row as it is.
        is_enabled: whether the settings of the layers were.
        shape: B and S, tokens.
        begins, ends: the numbers of the graph's nodes that it made, end excluded; None: not known.
        thread: that it ran in. Each thread numbers its own nodes.
    """

    plan: Any
    is_enabled: bool
    shape: tuple[int, int]
    begins: int | None
    ends: int | None = None
    thread: int = dataclasses.field(default_factory=threading.get_ident)

    def hold(self, output: Any) -> None:
        """The forward is over. It is known for as long as the graph of what it gave."""
        self.ends = next_node()
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.metadata[KEPT_IN_GRAPH] = self


class Forwards:
    """The forwards of a model that may be recomputed."""

    def __init__(self) -> None:
        self._known: list[weakref.ref[Forward]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Forwards:
        return Forwards()  # graphs are not copied

    def __reduce__(self) -> Any:
        return Forwards, ()

    def add(self, forward: Forward) -> None:
        """Know a forward while something refers to it."""
        self._known = [one for one in self._known if one() is not None] + [weakref.ref(forward)]

    def of_recomputation(self, shape: tuple[int, int]) -> Forward | None:
        """The forward that a layer of this shape is recomputed for now; None if the layer is called by hand.

        Raises: RuntimeError: it may be one of several, whose documents differ.
        """
        known = [one for one in (ref() for ref in self._known) if one is not None and one.shape == shape]
        node = torch._C._current_autograd_node()
        if node is None or not known:
            return None
        number, thread = node._sequence_nr(), threading.get_ident()
        # Backwards on a CPU run in the thread that asked for them.
        known = [one for one in known if one.thread == thread] or known
        fits = [one for one in known if one.begins is not None and one.ends is not None]
        fits = [one for one in fits if one.begins <= number < one.ends]
        if not fits:  # a node that was made in a recomputation comes later than its forward
            fits = [one for one in known if one.begins is None or one.begins <= number]
        if not fits or any(one.is_enabled != fits[0].is_enabled or one.plan is not fits[0].plan for one in fits):
            raise RuntimeError(
                f"Gradient checkpointing computes a layer with a state along the sequence again, and it is not known "
                f"which of {len(known)} forwards of {shape[0]} x {shape[1]} tokens, with other documents in their "
                f"rows, it does so for. Call backward() before the next forward, and run forwards whose loss is not "
                f"used within torch.no_grad()."
            )
        return fits[0]


def next_node() -> int | None:
    """The number of the next node of the graph in this thread; None without gradients."""
    if not torch.is_grad_enabled():
        return None
    return (torch.ones((), device="cpu", requires_grad=True) * 1).grad_fn._sequence_nr()


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        for one in x.values():
            yield from _tensors(one)
    elif isinstance(x, list | tuple):
        for one in x:
            yield from _tensors(one)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        yield from _tensors(vars(x))

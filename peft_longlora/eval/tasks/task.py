"""What every task is made of: items, each of which measures one window or prompt and gives one sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from peft_longlora.eval.subject import Subject


@dataclass(frozen=True)
class Item:
    """A window or prompt to be measured.

    Attributes:
        key: names the sample, once in a run.
        label: what the progress bar says. progress: the part of the label's work that ends with this item, 0 to 1.
        measure: gives the sample: a dict with key, task, dataset, protocol, variant, length, unit, measures.
        start: the same in two steps: queues the device's work and gives what waits for it, so that the next item can be
            started before. None: only in one step.
    """

    key: str
    label: str
    progress: float
    measure: Callable[[], dict[str, Any]]
    start: Callable[[], Callable[[], dict[str, Any]]] | None = None


class Task(Protocol):
    """A way to measure a model.

    Attributes:
        name: of the task. notes: sentences for the reader of the results, complete when all items were yielded.
    """

    name: str
    notes: list[str]

    @property
    def parameters(self) -> dict[str, Any]:
        """Settings that two runs must share for their samples to be compared."""

    def data(self) -> dict[str, Any] | None:
        """What was read, or None for a task that makes its own text.

        Raises: FileNotFoundError, ValueError: it is not there or cannot be read.
        """

    def check(self, subject: Subject) -> None:
        """Refuse what cannot be measured on this model, before anything is.

        Raises: ValueError.
        """

    def items(self, subject: Subject) -> Iterator[Item]:
        """Items in a fixed order, equal in all processes of a run."""


def name_of(task: Task) -> str:
    """A task's name, with its protocol where it has a choice of them."""
    protocol = task.parameters.get("protocol")
    return f"{task.name} ({protocol})" if protocol else task.name

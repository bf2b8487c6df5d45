"""The base of all tasks. A task has items; each item measures one window or prompt and gives one sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from peft_longlora.eval.subject import Subject


@dataclass(frozen=True)
class Item:
    """A window or prompt to measure.

    Attributes:
        key: the name of the sample, unique in a run.
        label: the text of the progress bar. progress: the part of the label's work that ends with this item, 0 to 1.
        measure: returns the sample: a dict with key, task, dataset, protocol, variant, length, unit, measures.
        start: the same in two steps. It queues the work on the device and returns a function that waits for the sample,
            so that the next item can be started before. None: the item has only one step.
    """

    key: str
    label: str
    progress: float
    measure: Callable[[], dict[str, Any]]
    start: Callable[[], Callable[[], dict[str, Any]]] | None = None


class Task(Protocol):
    """A way to measure a model.

    Attributes:
        name: the task's name. notes: warnings for readers of the results, complete after the last item.
    """

    name: str
    notes: list[str]

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings that must be equal in two runs to compare their samples."""

    def data(self) -> dict[str, Any] | None:
        """A description of the data, or None for a task that makes its own text.

        Raises: FileNotFoundError, ValueError: the data does not exist or cannot be read.
        """

    def check(self, subject: Subject) -> None:
        """Refuse what cannot be measured on this model, before anything is measured.

        Raises: ValueError.
        """

    def items(self, subject: Subject) -> Iterator[Item]:
        """The items, in a fixed order that is equal in all processes of a run."""


def name_of(task: Task) -> str:
    """A task's name in settings and data, with its protocol if it has several: "perplexity (documents)"."""
    return with_protocol(task.name, task)


def with_protocol(text: str, task: Task) -> str:
    """A task's name or an item's label, with the protocol in brackets if the task has several."""
    protocol = task.parameters.get("protocol")
    return f"{text} ({protocol})" if protocol else text

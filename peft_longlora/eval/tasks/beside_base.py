"""A task that is measured on the base too, so that one run says what an adapter changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.task import Item, Task


class BesideBase:
    """Another task, measured on the base first and then on the model itself.

    The base is the same model with its adapter switched off and its own RoPE, which is the base bit for bit. Its
    samples have the variant "base", and so their own names in the journal: a run without the base is continued by one
    with it, and nothing is measured twice.
    """

    def __init__(self, task: Task) -> None:
        """Nothing is measured yet.

        Args:
            task: the task.
        """
        self.task = task

    @property
    def name(self) -> str:
        """The task's own name."""
        return self.task.name

    @property
    def notes(self) -> list[str]:
        """The task's own notes."""
        return self.task.notes

    @property
    def parameters(self) -> dict[str, Any]:
        """The task's own settings, because a sample does not depend on whether the base is measured."""
        return self.task.parameters

    def data(self) -> dict[str, Any] | None:
        """The description of the task's data."""
        return self.task.data()

    def check(self, subject: Subject) -> None:
        """Refuse what cannot be measured on this model or its base. Raises: ValueError."""
        self.task.check(subject)
        if subject.variant != "base":
            self.task.check(subject.base())

    def items(self, subject: Subject) -> Iterator[Item]:
        """The items of the base, then those of the model."""
        if subject.variant != "base":
            for item in self.task.items(subject.base()):
                yield _on_base(subject, item)
        yield from self.task.items(subject)


def _on_base(subject: Subject, item: Item) -> Item:
    def measure() -> dict[str, Any]:
        with subject.as_base():
            return item.measure()

    def start() -> Callable[[], dict[str, Any]]:
        with subject.as_base():
            return item.start()

    label = f"{item.label}, base"
    return replace(item, label=label, measure=measure, start=start if item.start else None)

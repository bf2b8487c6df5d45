"""Make the items of an iterator ahead of their use, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

from peft_longlora.data.background import Background

T = TypeVar("T")


def prefetch(items: Iterator[T], size: int = 4) -> Iterator[T]:
    """The same items, but up to `size` of them are made ahead in a thread, while the model is busy.

    Args:
        items: made one by one; what it raises is raised here, at the item's place.
        size: the most items that wait.

    Raises:
        BaseException: what `items` raised.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(size)
    stop = threading.Event()

    def put(entry: tuple[T | None, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:  # passed to the thread that asked
            put((None, error))

    with Background(fill, stop.set):
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

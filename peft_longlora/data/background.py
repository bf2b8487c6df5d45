"""A thread beside the caller that ends before Python does.

Python kills daemon threads when it exits. If such a thread is inside torch or a tokenizer then, C++ and Rust cannot be
unwound and abort the whole process (SIGABRT, "terminate called without an active exception"). A thread that is no
daemon would keep a user waiting who pressed Ctrl-C. So this one is told to stop, and is waited for. Imports nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any


class Background:
    """Runs a function in a thread for as long as a `with` block lasts, and at most until Python exits.

    Args:
        work: what the thread does.
        stop: is called at the end; `work` must return soon after it.
    """

    def __init__(self, work: Callable[[], None], stop: Callable[[], Any]) -> None:
        self._stop, self._began = stop, threading.Event()

        def run(began: threading.Event = self._began) -> None:
            began.set()
            work()

        self.thread = threading.Thread(target=run, daemon=True)

    def __enter__(self) -> Background:
        """Start. Ctrl-C may come while the thread starts."""
        # Called by `__exit__`, or by Python at its end if a generator with such a block was never closed.
        self._end = weakref.finalize(self, _end, self.thread, self._began, self._stop)
        try:
            self.thread.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        """Tell the thread to stop, and wait for it."""
        self._end()


def _end(thread: threading.Thread, began: threading.Event, stop: Callable[[], Any]) -> None:
    stop()
    # A thread that has not begun cannot be waited for; when it begins, it finds that it has been told to stop.
    if thread is not threading.current_thread() and began.wait(1):
        thread.join()

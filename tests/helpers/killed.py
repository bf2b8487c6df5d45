"""A process that is killed in the middle of something."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def another_process(work: Callable[[Callable[[], None]], None]) -> Iterator[tuple[int, Callable[[], None]]]:
    """A fork that does `work(tell)`; when it has called `tell`, it is waited for here no longer, and it sleeps.

    Yields: its number, and what kills it, at the end at the latest. A fork, because importing anew takes seconds.
    """
    read, write = os.pipe()
    number = os.fork()
    if not number:
        try:
            work(lambda: (os.write(write, b"1"), time.sleep(600)))
        finally:
            os._exit(1)
    killed = []

    def kill() -> None:
        if not killed:
            os.kill(number, signal.SIGKILL)
            killed.append(os.waitpid(number, 0))

    os.close(write)
    try:
        assert os.read(read, 1) == b"1", "the other process failed"
        yield number, kill
    finally:
        os.close(read)
        kill()

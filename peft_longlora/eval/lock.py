"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from transformers.utils import logging

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
logger = logging.get_logger(__name__)


class FolderLock:
    """A lock that the operating system holds for a process, and releases when the process ends, however it ends.

    Args:
        folder: only one run at a time may write into it. Its file `.lock` stays; alone it has no meaning.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._file: Any = None

    def take(self) -> None:
        """Take the lock.

        Raises: ValueError: another run holds it.
        """
        self._file = self.path.open("a+b")
        try:
            self._lock()
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().decode(errors="replace").strip()
            self.release()
            raise ValueError(
                f"Another run writes into output={str(self.path.parent)!r} ({holder or 'its process is not known'}). "
                f"Wait for its end, or choose another output=..."
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning(f"{self.path} cannot be locked ({error}): make sure that no other run uses this folder.")
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._file.flush()

    @property
    def is_held(self) -> bool:
        """Whether this object has the lock."""
        return self._file is not None

    def _lock(self) -> None:
        if fcntl is not None:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        import msvcrt

        self._file.seek(2**30)  # bytes behind the end: those that are locked cannot be read by others
        msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)

    def release(self) -> None:
        """Release the lock. If it was not taken, nothing happens."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

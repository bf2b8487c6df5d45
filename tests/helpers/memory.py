"""The most memory that this process has held at a time, tensors and other libraries' memory included. Linux."""

from pathlib import Path

import pytest

_FORGET = Path("/proc/self/clear_refs")
needs_linux = pytest.mark.skipif(not _FORGET.exists(), reason="resident memory is read from Linux' /proc")


def highest() -> int:
    """Bytes, since the process began or `forget` was called."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def forget() -> int:
    """Begin anew; the bytes that are held now."""
    _FORGET.write_text("5")
    return highest()

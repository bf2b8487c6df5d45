"""How much of the host's memory a process may use for tensors that wait there."""

from __future__ import annotations

import os
from pathlib import Path

from peft_longlora.memory.plan import HOST_FILLED

OWN_GROUPS = Path("/proc/self/cgroup")  # Linux: a line for each hierarchy, "number:controllers:path"
GROUPS = Path("/sys/fs/cgroup")


def host_budget() -> int:
    """Bytes of the host's memory that a process may use: of its container or job, shared by this machine's ranks."""
    size = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *memory_limits()])
    return int(size * HOST_FILLED / max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def memory_limits() -> list[int]:
    """The limits of this process's control groups and of those around them, in bytes.

    A container sees its own group as the root. A job of SLURM or systemd is a group further down, in either version of
    control groups.
    """
    found = []
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (GROUPS / "memory", "memory.limit_in_bytes") if controllers else (GROUPS, "memory.max")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            if (file := folder / name).is_file() and (text := file.read_text().strip()).isdigit():
                found.append(int(text))
    return found

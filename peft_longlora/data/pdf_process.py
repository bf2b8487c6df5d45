"""Reads a PDF in a process of its own, for pages that serve strangers.

A single page of a PDF may hold a program that runs for hours or takes all memory, and nothing in the same process could
end it. Called by chat/document.py. The process imports pypdf, limits.py and pdf.py, and not torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_longlora.data.limits import Limits
from peft_longlora.data.pdf import iterate_pages, open_pdf

MEMORY = 4 * 2**30  # bytes of address space that reading a PDF may take
WAIT = 0.1  # seconds between two looks at whether anybody still waits
# The packages themselves import torch, which takes seconds and is not needed here.
_CHILD = """
import json, sys, types
paths, folder, *arguments = json.loads(sys.argv[1])
sys.path[:] = paths
for name, place in (("peft_longlora", folder), ("peft_longlora.data", folder + "/data")):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [place]
from peft_longlora.data.pdf_process import child
child(*arguments)
"""


def read_pages_apart(
    path: Path, limits: Limits, is_stopped: Callable[[], bool], on_page: Callable[[int, int], Any] | None = None
) -> list[str]:
    """The text of each page, as `pdf.read_pages`.

    Args:
        is_stopped: whether nobody waits for the text any more; the process is then ended.
        on_page: called with the pages read and all pages.

    Raises:
        ValueError, ImportError: as `read_pages`; also if the file takes more time or memory than is allowed, or if
            `is_stopped`.
    """
    folder = Path(__file__).parents[1]
    argument = json.dumps([sys.path, str(folder), str(path), asdict(limits)])
    command = [sys.executable, "-I", "-c", _CHILD, argument]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    end, pages, count = time.monotonic() + limits.seconds, [], None
    lines: list[dict[str, Any]] = []
    reader = threading.Thread(target=_read_lines, args=(process, lines), daemon=True)
    reader.start()
    try:
        while True:
            is_over = not reader.is_alive()
            while lines:
                line = lines.pop(0)
                if "error" in line:
                    raise {"ImportError": ImportError}.get(line["error"], ValueError)(line["message"])
                count = line.get("count", count)
                pages += [line["text"]] if "text" in line else []
                if on_page and count:
                    on_page(len(pages), count)
            if count is not None and len(pages) == count:
                return pages
            if is_over:
                raise ValueError(f"{path} cannot be read: reading it took too much memory. Save its text as .txt.")
            if is_stopped():
                raise ValueError(f"{path} is no longer wanted.")
            limits.check_time(path, end, f"page {len(pages) + 1}" + (f" of {count}" if count else ""))
            reader.join(WAIT)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def _read_lines(process: subprocess.Popen, lines: list[dict[str, Any]]) -> None:
    for line in process.stdout:
        if line.endswith(b"\n"):  # otherwise the process was ended in the middle of it
            lines.append(json.loads(line))


def child(path: str, limits: dict[str, float]) -> None:
    """What the process does: print how many pages there are, then the text of each, or an error."""

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # on Windows, or a stricter limit is set already
        pass
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr  # what a library prints is no answer
    try:
        reader = open_pdf(Path(path), Limits(**limits))
        print(json.dumps({"count": len(reader.pages)}), file=out)
        for text in iterate_pages(Path(path), Limits(**limits), reader):
            print(json.dumps({"text": text}), file=out)
    except (ValueError, ImportError) as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=out)

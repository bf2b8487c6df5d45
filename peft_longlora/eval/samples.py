"""The file of a run's samples: one JSON object a line. A damaged line is left out, and said.

A sample holds its key and its measures, and what its task says of it. `journal` writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft_longlora.hub.results import is_number

SAMPLES = "samples.jsonl"


def read_samples(path: Path, on_damage: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The samples of a file, one at a time; none if it is not there. A last line without an end is not read.

    Args:
        on_damage: called for each line that is not a sample, with a sentence that names file, line and fault.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    record = json.loads(line.decode())
                    fault = _fault(record)
                except (ValueError, RecursionError) as error:
                    fault = f"{type(error).__name__}: {error}"
                if fault:
                    on_damage(f"{path}, line {number}, is damaged ({fault}).")
                else:
                    yield record


def _fault(record: Any) -> str | None:
    """The fault of a sample: it has no key, or a number is not a number. None if it has no fault."""
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        return "not an object with a 'key'"
    for measure in record.get("measures", []):
        if not isinstance(measure, list) or len(measure) not in (4, 5) or not isinstance(measure[0], str):
            return f"{measure!r} is not a measure [metric, group, numerator, denominator]"
        for number in measure[2:4]:
            if not is_number(number):
                return f"{number!r} is not a number in {measure!r}"
    return None

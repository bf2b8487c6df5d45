"""Makes the results of a run: rows from its samples, and notes with warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch

from peft_longlora.eval.identity import device_name, versions
from peft_longlora.eval.report.cells import collect_cells, sort_key
from peft_longlora.eval.run import Run
from peft_longlora.eval.tasks.task import name_of
from peft_longlora.hub.results import Results, Row


def gather(run: Run) -> Results:
    """The results from the samples of this run's items, without places that are not completely measured."""
    samples = _Samples(run)
    cells = collect_cells(samples.measured())
    rows = [
        cell.row(run.settings.confidence)
        for cell in cells.values()
        if any(denominator for _, denominator in cell.units.values())
    ]
    rows.sort(key=sort_key)
    return Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions("transformers", "torch", "peft", "tokenizers", "datasets", "lm_eval", "rouge-score"),
        hardware={
            "device": device_name(run.subject.model.device),
            "threads": torch.get_num_threads(),
            "processes": run.processes.count,
        },
        model=run.subject.description,
        settings={**asdict(run.settings), **{name_of(task): task.parameters for task in run.tasks}},
        data={name: entry for name, entry in run.data.items() if entry},
        notes=list(dict.fromkeys(_notes(run, rows, samples))),
        results=[row for row in rows if row.group is None],
        details=[row for row in rows if row.group is not None],
        speed=run.speed,
        unmeasured=samples.unmeasured,
    )


class _Samples:
    """The samples of this run's items, and numbers that are noted while they are read.

    Attributes:
        unmeasured: places that lack samples. unasked: how many samples the folder holds that this run did not ask for,
            by place.
        cut: tokens that each prompt lost, by task and data. above: whether each prompt was above the window, of those
            whose length the data decides.
    """

    def __init__(self, run: Run):
        self._records, self._places = run.journal.records, run.places
        found: Counter[str] = Counter()
        self.unasked: Counter[str] = Counter()
        for record in self._records():
            if (place := self._places.get(record["key"])) is not None:
                found[place] += 1
            else:
                self.unasked[_place_of(record)] += 1
        self.unmeasured = [place for place, n in Counter(self._places.values()).items() if found[place] < n]
        self.cut: dict[str, list[int]] = {}
        self.above: dict[str, list[bool]] = {}

    def measured(self) -> Iterator[dict[str, Any]]:
        """Those of places that are measured in full."""
        for record in self._records():
            if self._places.get(record["key"]) in (None, *self.unmeasured):
                continue
            name = f"{record['task']} {record['dataset']}"
            if "cut_tokens" in record:
                self.cut.setdefault(name, []).append(record["cut_tokens"])
            if record["length"] is None and "beyond_window" in record:
                self.above.setdefault(name, []).append(record["beyond_window"])
            yield record


def _place_of(record: dict[str, Any]) -> str:
    """The place of a sample of an earlier run, such as "passkey 8192 (longlora)"."""
    place = " ".join(str(record[name]) for name in ("task", "length") if record.get(name))
    return f"{place or record['key']} ({record['protocol']})" if record.get("protocol") else place or record["key"]


def _notes(run: Run, rows: list[Row], samples: _Samples) -> Iterator[str]:
    yield from run.subject.notes
    for task in run.tasks:
        yield from task.notes
    for name, tokens in samples.cut.items():
        if any(tokens):
            yield (
                f"{name}: {sum(n > 0 for n in tokens)} of {len(tokens)} prompts were too long and lost their middle, "
                f"{sum(tokens)} tokens in all."
            )
    made_for = f"the window of {run.subject.window} tokens that the model was made for"
    has_base = run.subject.variant != "base"  # beside the model; a base alone is the model
    for made, is_base in ((made_for, False), (f"the base's window of {run.subject.native_window} tokens", True)):
        ours = [row for row in rows if (has_base and row.variant == "base") == is_base]
        if beyond := sorted({row.length for row in ours if row.beyond_window and row.length}):
            yield f"Above {made}: {', '.join(map(str, beyond))} tokens (marked †)."
    for name, are_above in samples.above.items():
        if any(are_above):
            yield (
                f"{name}: {sum(are_above)} of {len(are_above)} prompts, with their answers, were above {made_for} "
                f"(marked †)."
            )
    if samples.unmeasured:
        yield f"Out of memory, and so not measured: {', '.join(samples.unmeasured)}."
    if samples.unasked:
        places = ", ".join(f"{place}: {n}" for place, n in samples.unasked.items())
        yield (
            f"The folder also holds samples that this run did not ask for and does not count ({places}). To see their "
            f"results again, ask for them too; nothing is measured twice."
        )

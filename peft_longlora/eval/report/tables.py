"""results.md: the rows as Markdown tables. Calls `plots` if matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging

from peft_longlora.eval.report.cells import sort_key
from peft_longlora.eval.report.units import show, show_interval, show_length, show_metric
from peft_longlora.hub.markdown import cell
from peft_longlora.hub.results import Results, Row
from peft_longlora.hub.writing import write_whole

REPORT = "results.md"
VARIANTS = ("base", "rescaled", "adapter")  # before, and after
logger = logging.get_logger(__name__)


def write_report(results: Results, folder: Path) -> None:
    """Write results.md and the plots into a folder."""
    try:
        from peft_longlora.eval.report.plots import write_plots
    except ImportError:
        logger.warning("No plots: matplotlib is not installed. pip install 'peft-longlora[eval]'")
        images = []
    else:
        images = write_plots(results, folder)
    text = make_report(results) + "".join(f"\n![{image}]({image})\n" for image in images)
    write_whole(folder / REPORT, text)


def make_report(results: Results) -> str:
    """The tables in Markdown."""
    model = results.model
    name = model["name"] + (f" + {model['adapter']}" if model.get("adapter") else "")
    rope = (model.get("rope_parameters") or {}).get("rope_type", "default")
    lines = [
        f"# {cell(name)}",
        "",
        f"{model['attention']} attention, {model['dtype']}, RoPE {rope}, window {model['native_window']} -> "
        f"{model['window']} tokens. {results.hardware['device']}, {results.hardware['processes']} process(es). "
        + ", ".join(f"{package} {version}" for package, version in results.versions.items())
        + f". {results.created}.",
        "",
        f"Brackets: {100 * results.settings['confidence']:g}% intervals over documents or prompts. † above the window "
        f"that the model was made for.",
        "",
    ]
    lines += [*_main_table(results.results), ""]
    for title, rows in _by_title(results.details).items():
        lines += [f"## {cell(title)}", "", *_grid(rows), ""]
    if results.notes:
        lines += ["## Notes", "", *(f"- {cell(note)}" for note in results.notes), ""]
    return "\n".join(lines)


def _main_table(rows: list[Row]) -> list[str]:
    """A line a row; if there are several models, they stand beside each other, and a line is a thing measured."""
    variants = [name for name in VARIANTS if any(row.variant == name for row in rows)]
    variants += sorted({row.variant for row in rows} - set(variants))
    if len(variants) < 2:
        head = ["task", "protocol", "data", "model", "length", "metric", "value", "interval", "n"]
        body = [
            [
                r.task,
                r.protocol,
                r.dataset,
                r.variant,
                show_length(r),
                show_metric(r),
                show(r),
                show_interval(r),
                r.units,
            ]
            for r in rows
        ]
        return table(head, [list(map(str, row)) for row in body])
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.name, {})[row.variant] = row
    head = ["task", "protocol", "data", "length", "metric", *variants, "n"]
    body = []
    for by_variant in found.values():
        row = next(iter(by_variant.values()))
        values = [_cell(by_variant.get(variant)) for variant in variants]
        length = "" if row.length is None else str(row.length)
        body.append([row.task, row.protocol, row.dataset, length, show_metric(row), *values, str(row.units)])
    return table(head, body)


def _cell(row: Row | None) -> str:
    """A value with its interval, marked where the length is above the model's window."""
    if row is None:
        return ""
    return " ".join(filter(None, (show(row) + ("†" if row.beyond_window else ""), show_interval(row))))


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table with aligned columns; names of others stay text in it."""
    head, body = [cell(text) for text in head], [[cell(text) for text in row] for row in body]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rows = [head, ["-" * width for width in widths], *body]
    return [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]


def _by_title(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=sort_key):
        title = f"{row.task}, {row.protocol}, {row.dataset}, {row.variant}: {show_metric(row)}"
        found.setdefault(title, []).append(row)
    return found


def _grid(rows: list[Row]) -> list[str]:
    """Groups down, lengths across."""
    lengths = list(dict.fromkeys((row.length, show_length(row)) for row in rows))
    # Start with the longest row, so that buckets are in order of position.
    order = sorted(rows, key=lambda row: -(row.length or 0))
    groups = sorted(dict.fromkeys(row.group for row in order), key=lambda g: sort_key(_first(rows, g))[-1])
    body = []
    for group in groups:
        cells = {row.length: row for row in rows if row.group == group}
        body.append(
            [group, *(f"{show(cells[n])} {show_interval(cells[n])}".strip() if n in cells else "" for n, _ in lengths)]
        )
    return table(["", *(text or "all" for _, text in lengths)], body)


def _first(rows: list[Row], group: str | None) -> Row:
    return next(row for row in rows if row.group == group)

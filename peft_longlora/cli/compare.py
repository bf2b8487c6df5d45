"""`longlora compare`: two runs of `longlora eval` side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Command, folder, refuse_file


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `longlora compare`."""
    add = parser.add_argument
    add("first", help="results.json, or its folder")
    add("second", help="the same for the second run")
    add("--labels", nargs=2, default=["first", "second"], help="names of the two runs (first second)")
    add("--output", type=folder, default=Path("compare"), help="folder for table and plot (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, and write it with its plot."""
    from peft_longlora.eval.report.comparison import compare
    from peft_longlora.eval.report.side_by_side import PLOT, REPORT, write_comparison

    refuse_file(args.output, (REPORT, PLOT))
    differences, notes = compare(args.first, args.second)
    try:
        report = write_comparison(differences, notes, tuple(args.labels), args.output)
    except OSError as error:
        raise ValueError(
            f"--output {args.output}: cannot be written ({error.strerror}). Give another folder."
        ) from error
    print(report)
    print(f"{args.output}: {REPORT} and {PLOT}")
    return 0


COMMAND = Command(
    "compare",
    "set two results.json side by side",
    add_options,
    run,
    description="Set two runs of longlora eval side by side, with differences and their intervals: as a table on the "
    "terminal and in compare.md, and as a plot in compare.png.",
)

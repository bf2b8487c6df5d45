"""`longlora compare`."""

from __future__ import annotations

import argparse

from peft_longlora.cli.arguments import refuse_file


def run_compare(args: argparse.Namespace) -> None:
    """`longlora compare`."""
    from peft_longlora.eval.report import comparison as pairs

    refuse_file(args.output)
    differences, notes = pairs.compare(args.first, args.second)
    labels = tuple(args.labels)
    text = pairs.make_comparison(differences, notes, labels)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / pairs.REPORT).write_text(text, encoding="utf-8")
    pairs.plot_comparison(differences, labels).savefig(args.output / pairs.PLOT)
    print(text)
    print(f"{args.output}: {pairs.REPORT} and {pairs.PLOT}")

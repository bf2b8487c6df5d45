"""`longlora reach`: which layers of a model attend farthest, to choose those that stay dense in training."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Command, add_model_options, model_options, positive, say_options, tokens

if TYPE_CHECKING:
    import torch

    from peft_longlora.eval import Corpus, Subject


SINKS = 128  # first tokens, which `far_layers` does not count as far


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `longlora reach`."""
    add = parser.add_argument
    add("--data", nargs="+", required=True, help="long text: files, folders of files, or a dataset's Hub id")
    add("--length", type=tokens, help="tokens of a row, as 32k (default: the model's window)")
    add("--beyond", type=tokens, help="tokens; attention farther back counts (default: a quarter of --length)")
    add("--rows", type=positive, default=4, help="rows to measure (%(default)s)")
    add("--top", type=positive, default=5, help="layers to propose (%(default)s)")
    add("--plot", type=Path, help="a PNG with a bar for each layer")
    add("--context-length", type=tokens, help="rescale RoPE to this window in tokens, as 32k, without an adapter")
    add("--rope-type", help="how --context-length rescales: yarn, ntk, linear, ... (yarn)")
    add("--split", default="train", help="split of a dataset on the Hub (%(default)s)")
    add("--text-field", default="text", help="the field of a record that holds the document (%(default)s)")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the layers in order, and draw them."""
    from peft_longlora import far_layers
    from peft_longlora.eval import Corpus, load_subject

    if args.plot is not None and (args.plot.is_dir() or not args.plot.parent.is_dir()):
        raise ValueError(f"--plot {args.plot}: it is a folder, or lies in one that does not exist. Give a file.")
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise ValueError(f"--plot {args.plot}: the plot is a PNG. Give a file whose name ends in .png.")
    if args.length is not None:
        _check_length(args.length, args.beyond)
    corpus = Corpus(args.data, args.split, None, args.text_field)
    corpus.summary()  # refuses bad data before a model is loaded
    rope = dict(context_length=args.context_length, rope_type=args.rope_type)
    subject = load_subject(**model_options(args), **rope, device=args.device)
    length = args.length or subject.window
    rows = _rows(corpus, subject, length, args.rows)
    beyond = args.beyond or length // 4
    notes = list(subject.notes)
    if length > subject.window:
        notes.append(
            f"length={length} is above the model's window of {subject.window} tokens, so it attends otherwise than "
            f"after training. Give the window of the planned training with context_length=..."
        )
    for note in notes:
        print(f"warning: {say_options(note, args, COMMAND.options)}", file=sys.stderr)
    shares = far_layers(subject.model, rows, beyond)
    chosen = list(shares)[: args.top]
    fewer = f" (--data holds no more than these of --rows {args.rows})" if len(rows) < args.rows else ""
    print(f"{len(rows)} rows of {length} tokens{fewer}")
    print(f"{'layer':>5}  weight {beyond} tokens and more before the query")
    for layer, share in shares.items():
        print(f"{layer:>5}  {100 * share:6.2f}%{'  *' if layer in chosen else ''}")
    print(f"LongLoraConfig(dense_layers={sorted(chosen)})")
    if args.plot is not None:
        from peft_longlora.eval.report.layers import plot_reach

        plot_reach(shares, chosen, beyond, args.plot)
        print(args.plot)
    return 0


def _check_length(length: int, beyond: int | None) -> None:
    """Refuse rows in which no key is far back, before a model is loaded.

    Raises: ValueError.
    """
    far = beyond or max(1, length // 4)
    if length <= far + SINKS:
        least = far + SINKS + 1 if beyond else next(n for n in range(SINKS, 2 * SINKS) if n > n // 4 + SINKS)
        back = f"--beyond {beyond}" if beyond else "a quarter of it"
        raise ValueError(
            f"--length {length}: no token is {back} before another one, behind the first {SINKS}. Give rows of "
            f"{least} tokens or more."
        )


def _rows(corpus: Corpus, subject: Subject, length: int, count: int) -> list[torch.Tensor]:
    """The first whole rows of the documents, one a document before a second one of any.

    Raises: ValueError: no document is as long as a row.
    """
    found: list[tuple[int, int, torch.Tensor]] = []
    for window in corpus.document_windows(subject.encode_all, length, length):
        if len(window.inputs) == length:
            found.append((window.number, window.document, window.inputs))
        if sum(number == 0 for number, _, _ in found) == count:
            break
    if not found:
        raise ValueError(f"--length {length}: no document of --data is longer than that. Use a shorter one.")
    return [ids for _, _, ids in sorted(found, key=lambda row: row[:2])[:count]]


COMMAND = Command(
    "reach",
    "which layers attend farthest",
    add_options,
    run,
    description="Measure on a few rows which share of its attention each layer gives to tokens far back, to choose "
    "the layers that stay dense in training (dense_layers).",
    epilog="Example: longlora reach --model HuggingFaceTB/SmolLM2-135M-Instruct --context-length 32k --data books/ "
    "--beyond 4k --plot reach.png",
)

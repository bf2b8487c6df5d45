"""Options that `longlora chat` and `longlora app` share: memory, and how answers are chosen."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import penalty, positive, share, temperature

CACHES = ("dense", "quantised", "offloaded")


def add_answering_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a `Conversation`."""
    memory = parser.add_argument_group("memory").add_argument
    memory(
        "--cache",
        default="dense",
        choices=CACHES,
        help="cache of keys and values; quantised: 4 bits, needs hqq or optimum-quanto; offloaded: in the CPU's memory",
    )
    memory("--chunk", type=positive, default=2048, help="tokens of the document in one forward (%(default)s)")
    add = parser.add_argument_group("answers (default: as in the model's generation_config)").add_argument
    add("--max-new-tokens", type=positive, default=256, help="the most tokens of an answer (%(default)s)")
    add("--temperature", type=temperature, help="0: always the most likely token; above 0: sample")
    add("--top-p", type=share, help="nucleus sampling, if answers are sampled")
    add("--repetition-penalty", type=penalty, help="above 1: tokens that are there already become less likely")
    add("--seed", type=int, default=0, help="the same seed gives the same answers (%(default)s)")
    add("--plain", action="store_true", help="use no chat template, even if the tokenizer has one")


def answering_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_answering_options`, as `Conversation` takes them."""
    names = ("cache", "max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed", "plain")
    return {name: getattr(args, name) for name in names} | {"chunk_size": args.chunk}

"""`longlora push`: an adapter's folder goes to the Hub in one commit."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .arguments import Command, say_options

if TYPE_CHECKING:
    from peft_longlora.hub.folder import Pushed


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `longlora push`."""
    add = parser.add_argument
    add("folder", help="the adapter's folder")
    add("name", help="the repository on the Hub: owner/name, or a name of your own; it is made if it is not there")
    add("--private", action="store_true", help="make a new repository private")
    add("--base", help="the base's id on the Hub, if the adapter was trained on a base in a folder")
    add("--results", help="a folder that longlora eval wrote, if its results do not lie with the adapter yet")
    add("--license", help="the adapter's licence, such as apache-2.0 (default: the base's)")
    add("--datasets", nargs="+", metavar="ID", help="data sets on the Hub that it was trained on")
    add("--language", nargs="+", metavar="CODE", help="languages of the data, such as en")
    add("--include", nargs="+", default=[], metavar="PATTERN", help="push further files too, such as '*.csv'")
    add("--revision", help="branch to push to; it is made if it is not there (default: main)")
    add("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    add("--message", help="the commit's message (Upload adapter)")


def run(args: argparse.Namespace) -> int:
    """Push, and say what went there and what was left out."""
    try:
        pushed = _push(args)
    except OSError as error:  # huggingface_hub's own class is one
        if getattr(getattr(error, "response", None), "status_code", None) != 401:
            raise
        raise ValueError(
            "The Hub does not accept the token. Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
        ) from error
    for note in pushed.notes:
        print(f"warning: {say_options(note, args, COMMAND.options)}", file=sys.stderr)
    print(f"Pushed: {', '.join(pushed.names)}")
    if pushed.left_out:
        print(f"Left out: {', '.join(pushed.left_out)} (--include pushes files that belong to the adapter)")
    print(pushed.commit.pr_url or pushed.commit.commit_url)
    return 0


def _push(args: argparse.Namespace) -> Pushed:
    from peft_longlora.hub.folder import push_folder

    return push_folder(
        args.folder,
        args.name,
        base=args.base,
        results=args.results,
        include=args.include,
        license=args.license,
        datasets=args.datasets,
        language=args.language,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
    )


COMMAND = Command(
    "push",
    "push an adapter's folder to the Hub",
    add_options,
    run,
    description="Push an adapter's folder to the Hub in one commit: weights, card with its results, results.json, "
    "plots and tokenizer. Text that people wrote into the README, on the disk or on the Hub, is kept.",
    epilog="Log in first: hf auth login, or set HF_TOKEN. Example: longlora push my-32k-adapter me/my-32k-adapter",
    interrupted="Stopped. Nothing is committed; the same command completes the push.",
)

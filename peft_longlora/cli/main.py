"""The command line: its commands, and how they end. Bad input ends with code 2 and one line."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from . import app, chat, compare, evaluate, plan, push, reach, train
from .arguments import Command, Parser, say_options
from .completion import INSTALL, Completion

MODULES = (train, evaluate, compare, chat, app, push, plan, reach)
COMMANDS = {module.COMMAND.name: module.COMMAND for module in MODULES}
BAD_INPUT = (ValueError, NotImplementedError, ImportError, OSError)


class Version(argparse.Action):
    """Print the versions that results depend on, and exit."""

    def __init__(self, **options: Any):
        super().__init__(nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Read the versions from the installed packages, without importing them."""
        try:
            own = version("peft-longlora")
        except PackageNotFoundError:  # run from its sources
            from peft_longlora import __version__ as own
        others = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
        print(f"longlora {own} (Python {platform.python_version()}, {others})")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = Parser(
        prog="longlora",
        description="Train, measure, read with and push language models with long windows.",
    )
    parser.add_argument(
        "--version", action=Version, help="show the version, and those of Python, torch, transformers and peft"
    )
    parser.add_argument(
        "--completion", action=Completion, help=f"print a script for the Tab key: {INSTALL['bash']}; zsh and fish too"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS.values():
        about = dict(help=command.summary, description=command.description or command.summary, epilog=command.epilog)
        command.add_options(commands.add_parser(command.name, **about))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = make_parser()
    args, more = parser.parse_known_args(argv)
    command = COMMANDS[args.command]
    if more and not command.takes_more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    args.more = more
    # A user of a command cannot change names that one of its libraries calls old and another one needs.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return command.run(args)
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has ended; without this Python complains when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(command.interrupted, file=sys.stderr)
        return 130
    except (*BAD_INPUT, RuntimeError, MemoryError) as error:
        reason = _reason(error, args, command)
        if reason is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"longlora {command.name}: error: {reason}", file=sys.stderr)
        return 2


def _reason(error: Exception, args: argparse.Namespace, command: Command) -> str | None:
    """The error as one line for the user. None: it is a bug of this package, so show the traceback."""
    from peft_longlora.hub.loading import is_out_of_memory

    reason = " ".join(str(error).split())
    if is_out_of_memory(error):
        reason = reason or type(error).__name__
        return f"The model does not fit into memory ({reason[:120]} ...). Try --dtype bfloat16, or another --device."
    return say_options(reason, args, command.options) if isinstance(error, BAD_INPUT) else None

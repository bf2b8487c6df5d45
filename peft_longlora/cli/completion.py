"""`longlora --completion SHELL`: a script that completes commands and options on the Tab key, made by shtab."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

SHELLS = ("bash", "zsh", "fish")
# Options whose values are files or folders.
FILES = ("file", "data", "unseen", "first", "second", "topics", "multidoc", "longqa", "longqa_prompts", "recipe")
FOLDERS = ("model", "adapter", "tokenizer", "output", "folder", "results", "include_path")
INSTALL = {
    "bash": 'eval "$(longlora --completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(longlora --completion zsh)" after compinit in ~/.zshrc',
    "fish": "longlora --completion fish | source in ~/.config/fish/config.fish",
}


class Completion(argparse.Action):
    """Print the script for a shell, and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(choices=SHELLS, **options)

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, *__: Any) -> NoReturn:
        """Make the script from all commands and options."""
        try:
            import shtab
        except ImportError:
            parser.error("--completion needs shtab: pip install 'peft-longlora[completion]'")
        for action in _actions(parser):
            if action.dest in FILES:
                action.complete = shtab.FILE
            elif action.dest in FOLDERS:
                action.complete = shtab.DIRECTORY
        print(shtab.complete(parser, shell=shell))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options and arguments of a parser and of its commands."""
    found = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += _actions(command)
    return found

"""`longlora train`: a recipe's run, from its data to an adapter with results on its card."""

from __future__ import annotations

import argparse

from .arguments import Command


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `longlora train`. All keys of recipes are options too: `Command.takes_more`."""
    parser.allow_abbrev = False
    parser.usage = "longlora train [RECIPE] [--key value ...] [--dry-run] | longlora train --keys [WORD]"
    add = parser.add_argument
    add(
        "--dry-run",
        action="store_true",
        help="load no weights: check what shows without them, say what would be done and what is not checked",
    )
    add("--keys", nargs="?", const="", metavar="WORD", help="list the keys of recipes, or those that hold a word")


def run(args: argparse.Namespace) -> int:
    """Train, or say what would be trained."""
    from peft_longlora.training.recipe import keys, read_recipe

    if args.keys is not None:
        for key in keys().values():
            if args.keys.lower() in f"{key.name} {key.help}".lower():
                print(f"{key.name}: {key.default!r}\n    {key.help}")
        return 0
    # argparse would take the first value of an unknown option for the recipe.
    has_recipe = bool(args.more) and not args.more[0].startswith("--")
    recipe = read_recipe(args.more[0] if has_recipe else None, args.more[has_recipe:])
    from peft_longlora.memory.fragments import expand_segments
    from peft_longlora.training.run import train

    expand_segments()
    return train(recipe, dry_run=args.dry_run)


COMMAND = Command(
    "train",
    "train an adapter as a recipe says",
    add_options,
    run,
    description="Train an adapter as a recipe says: continued pre-training on text, or instruction tuning on records. "
    "RECIPE is a .yaml file, or the name of one that comes with the package. Every key of a recipe is an option too, "
    "and wins: --learning-rate 1e-4. If a run was stopped, the same command goes on from its last checkpoint.",
    epilog="Example: longlora train recipes/smollm2-135m-32k.yaml --data books/ --output-dir runs/books. On several "
    "GPUs: accelerate launch -m peft_longlora train ... docs/training.md explains the keys.",
    interrupted="Stopped at once. Checkpoints in output_dir are kept; the same command goes on from the last one.",
    options={"repositories": "repositories"},
    takes_more=True,
)

"""The choices of docs/recipe.md, each with the two cells that decide it. Called by `report`.

A choice names what to set and what it is compared with, as study/cell/budget. Figures are made from the lines.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

MARK = "<!-- choices: python experiments/report.py -->", "<!-- end of choices -->"


@dataclass(frozen=True)
class Choice:
    """what: the thing to decide. value: what to set. other: what it is compared with. mine, theirs: their cells."""

    what: str
    value: str
    other: str
    mine: str
    theirs: str


SCHEDULE, LOCAL = "schedules/local-4096-dense-6", "local, G = 1/8, every 6th dense"
FAR, ADAPTIVE = "schedules/local-2048-far-3-dense-8/time", "schedules/adaptive-dense-6/tokens"
LONG_SKIPS = "long/local-8192-dense-6-skips"
CHOICES = [
    Choice("attention, 2e-4, equal time", LOCAL, "full", f"{SCHEDULE}/time", "schedules/full/tokens"),
    Choice("attention, 2e-4, equal tokens", LOCAL, "full", f"{SCHEDULE}/tokens", "schedules/full/tokens"),
    Choice("attention, 5e-4, equal tokens", LOCAL, "full", "rates/5e-4/tokens", "rates/full-5e-4/tokens"),
    Choice("attention, 1e-3, equal tokens", LOCAL, "full", "rates/1e-3/tokens", "rates/full-1e-3/tokens"),
    Choice("attention, 1e-3, equal time", LOCAL, "full", "rates/1e-3, 233 steps/tokens", "rates/full-1e-3/tokens"),
    Choice("attention, 2e-4, equal time", LOCAL, "S2, G = 1/4", f"{SCHEDULE}/time", "schedules/s2-8192/time"),
    Choice("the shift, G = 1/4", "no (local)", "yes (S2)", "schedules/local-8192/tokens", "schedules/s2-8192/tokens"),
    Choice("the shift, dense steps", "no", "yes", f"{SCHEDULE}/tokens", "schedules/s2-4096-dense-6/tokens"),
    Choice("the shift, dense steps, equal time", "no", "yes", f"{SCHEDULE}/time", "schedules/s2-4096-dense-6/time"),
    Choice("dense steps, equal time", LOCAL, "none, G = 1/4", f"{SCHEDULE}/time", "schedules/local-8192/time"),
    Choice("far layers dense too", "no", "3 layers, G = 1/16, every 8th dense", f"{SCHEDULE}/time", FAR),
    Choice("blocks by content between dense steps", "no (local)", "adaptive", f"{SCHEDULE}/tokens", ADAPTIVE),
    Choice(
        "blocks by content between dense steps, 1e-3, equal time",
        "no (local)",
        "adaptive",
        "rates/1e-3, 233 steps/tokens",
        "adaptive/adaptive-dense-6/time",
    ),
    Choice("where the dense steps go", "every 6th", "the last 25", "courses/spread/tokens", "courses/last/tokens"),
    Choice("where the dense steps go", "every 6th", "the first 25", "courses/spread/tokens", "courses/first/tokens"),
    Choice("positions between dense steps", "as they are", "skip", "courses/spread/tokens", "courses/skips/tokens"),
    Choice(
        "the dense steps' place, positions skip",
        "every 6th",
        "every 3rd, second half",
        "courses/skips/tokens",
        "courses/late-skips/tokens",
    ),
    Choice("rows of sparse steps", "whole", "2 parts, a step each", "courses/spread/tokens", "courses/parts-2/tokens"),
    Choice("attention, 1e-3, positions skip", f"{LOCAL}, skips", "full", "courses/skips/tokens", "courses/full/tokens"),
    Choice("65536 tokens, 1e-3, equal tokens", LOCAL, "full", "long/local-8192-dense-6/tokens", "long/full/tokens"),
    Choice("65536 tokens, 1e-3, equal time", LOCAL, "full", "long/local-8192-dense-6/time", "long/full/tokens"),
    Choice("65536 tokens, 1e-3, equal tokens", f"{LOCAL}, skips", "full", f"{LONG_SKIPS}/tokens", "long/full/tokens"),
    Choice("65536 tokens, 1e-3, equal time", f"{LOCAL}, skips", "full", f"{LONG_SKIPS}/time", "long/full/tokens"),
    Choice("what is dense", "every 6th step", "5 layers in turn", "courses/spread/tokens", "courses/rotating/tokens"),
    Choice("groups", "4096, every 6th step dense", "2048 to 32768", "courses/spread/tokens", "courses/ladder/tokens"),
    Choice(
        "groups and dense steps, the same work",
        "G = 1/8, every 6th",
        "G = 1/32, every 4th",
        "courses/spread/tokens",
        "courses/1024-dense-4/tokens",
    ),
    Choice("dense steps, G = 1/8", "every 6th", "every 3rd", f"{SCHEDULE}/tokens", "cost/local-4096-dense-3/tokens"),
    Choice(
        "dense steps and work",
        "G = 1/8, every 6th: 0.27",
        "G = 1/4, every 6th: 0.375",
        f"{SCHEDULE}/tokens",
        "cost/local-8192-dense-6/tokens",
    ),
    Choice(
        "dense steps and work",
        "G = 1/4, every 3rd: 0.50",
        "full: 1",
        "cost/local-8192-dense-3/tokens",
        "schedules/full/tokens",
    ),
    Choice(
        "work", "0.27 (G = 1/8)", "0.10 (G = 1/16, every 24th)", f"{SCHEDULE}/tokens", "cost/local-2048-dense-24/tokens"
    ),
    Choice("learning rate, full attention", "1e-3", "2e-3", "rates/full-1e-3/tokens", "courses/full-2e-3/tokens"),
    Choice("learning rate, the schedule", "1e-3", "2e-4", "rates/1e-3/tokens", f"{SCHEDULE}/tokens"),
    Choice("learning rate, the schedule", "1e-3", "5e-4", "rates/1e-3/tokens", "rates/5e-4/tokens"),
    Choice("learning rate, full attention", "1e-3", "2e-4", "rates/full-1e-3/tokens", "schedules/full/tokens"),
    Choice(
        "LoRA's modules, 2e-4", "all linear layers", "q, k, v, o", "trained/all-linear/tokens", f"{SCHEDULE}/tokens"
    ),
    Choice("LoRA's modules, 1e-3", "all linear layers", "q, k, v, o", "best/local-1e-3/tokens", "rates/1e-3/tokens"),
    Choice(
        "all linear layers, 1e-3, equal tokens",
        f"{LOCAL}, skips",
        "full",
        "best/skips-1e-3/tokens",
        "best/full-1e-3/tokens",
    ),
    Choice("the best together, positions", "skip", "as they are", "best/skips-1e-3/tokens", "best/local-1e-3/tokens"),
    Choice("embeddings and norms", "trained", "frozen", f"{SCHEDULE}/tokens", "trained/lora/tokens"),
    Choice("RoPE", "yarn", "linear", f"{SCHEDULE}/tokens", "rope/linear/tokens"),
    Choice("RoPE", "yarn", "ntk", f"{SCHEDULE}/tokens", "rope/ntk/tokens"),
    Choice("RoPE", "yarn", "dynamic", f"{SCHEDULE}/tokens", "rope/dynamic/tokens"),
    Choice("RoPE", "yarn", "learned", f"{SCHEDULE}/tokens", "rope/learned/tokens"),
    Choice("rank, alpha twice as large, 2e-4", "16", "8", f"{SCHEDULE}/tokens", "ranks/8/tokens"),
    Choice("rank, alpha twice as large, 2e-4", "32", "16", "ranks/32/tokens", f"{SCHEDULE}/tokens"),
    Choice("rank, alpha twice as large, 2e-4", "64", "16", "ranks/64/tokens", f"{SCHEDULE}/tokens"),
    Choice("rank, alpha twice as large, 2e-4", "128", "16", "ranks/128/tokens", f"{SCHEDULE}/tokens"),
    Choice(
        "blocks by content, no dense steps",
        "adaptive",
        "S2, G = 1/4",
        "schedules/adaptive/tokens",
        "schedules/s2-8192/tokens",
    ),
    Choice("embeddings, no norms", "trained", "frozen", "trained/embeddings/tokens", "trained/lora/tokens"),
    Choice(
        "all linear layers, beside them",
        "nothing",
        "both",
        "trained/all-linear-alone/tokens",
        "trained/all-linear/tokens",
    ),
    Choice("embeddings beside norms", "trained", "frozen", f"{SCHEDULE}/tokens", "trained/norms/tokens"),
    Choice("training at all", "150 steps", "YaRN alone", f"{SCHEDULE}/tokens", "schedules/untrained/tokens"),
]


def choice_table(lines: dict[tuple[str, str, str], list[dict[str, Any]]]) -> list[str]:
    """The rows of choices whose cells have both run, as a Markdown table.

    Args:
        lines: by study, cell and budget: the lines of all seeds.
    """
    rows = []
    for choice in CHOICES:
        mine, theirs = (lines.get(tuple(name.split("/")), []) for name in (choice.mine, choice.theirs))
        if not {line["seed"] for line in mine} & {line["seed"] for line in theirs}:
            continue
        seeds = {line["seed"] for line in mine} & {line["seed"] for line in theirs}  # pairs of the same rows
        pairs = [[line["metrics"] for line in some if line["seed"] in seeds] for some in (mine, theirs)]
        a, b = (statistics.fmean(one["perplexity"] for one in some) for some in pairs)
        keys = [statistics.fmean(list(one["passkey"].values())[-1]["right"] for one in some) for some in pairs]
        cells = f"`{choice.mine}`, `{choice.theirs}`"
        rows.append(
            f"| {choice.what} | {choice.value} | {choice.other} | {a:.2f} | {b:.2f} | {100 * (a / b - 1):+.2f}% | "
            f"{keys[0]:.3g} / {keys[1]:.3g} | {len(seeds)} | {cells} |"
        )
    last = "keys at the window's end, of 20"
    head = f"| choice | set | instead of | perplexity | instead | difference | {last} | seeds | cells |"
    return [head, "| --- | --- | --- | --- | --- | --- | --- | --- | --- |", *rows]

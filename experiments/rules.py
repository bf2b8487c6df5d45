"""What a study may say. Called by `cells` when it is read, before anything is trained.

What depends on the model (`rotating_layers` and its layers) is refused by `course`, what depends on the books by
`metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

ALONE = "dense_steps", "group_sizes", "rotating_layers", "unscored", "dense_weight", "accumulation"
GROUPED = "dense_steps", "group_sizes", "rotating_layers", "unscored", "dense_weight"
PLANS = {"every", "after", "first", "last"}
SWITCHES = "gradient_checkpointing", "bf16", "skip_positions", "liger", "compile"


def check_shape(content: Any) -> None:
    """Refuse YAML that is not built as a study is. Raises: ValueError."""
    if not isinstance(content, dict):
        raise ValueError(f"a study is a mapping of keys to values, and this is {content!r:.80}.")
    entries = content.get("cells", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"cells={entries!r:.80} must be a list of mappings, each with a name.")
    for part in (content, *entries):
        for key in ("config", "training", "evaluation"):
            if not isinstance(part.get(key, {}), dict):
                raise ValueError(f"{key}={part[key]!r:.80} must be a mapping. Leave the key out if it has nothing.")
        for key in ("title", "inherit", "name", "label", "reference"):
            if not isinstance(part.get(key, ""), str):
                raise ValueError(f"{key}={part[key]!r} is no text to YAML. Put it in quotes.")


def check_plan(part: dict[str, Any], budgets: Sequence[str], seeds: Sequence[int] | None = None) -> None:
    """Refuse seeds, budgets and windows that no cell could have, of a study or of one of its cells.

    Args:
        budgets: those that there are. seeds: of the study, whose cells have some of them.

    Raises: ValueError: a value outside its rule.
    """
    window, mine, found = part.get("window", 4), part.get("seeds", [0]), part.get("budgets", ["tokens"])
    if (seeds is None and "window" not in part) or not _is_count(window, 4):
        raise ValueError(f"window={part.get('window')!r} must be the tokens of a training row, 4 or more.")
    if not _are_different(mine) or not all(_is_count(one, 0) for one in mine):
        raise ValueError(f"seeds={mine!r} must be a list of different whole numbers, 0 or more.")
    if seeds is not None and set(mine) - set(seeds):
        raise ValueError(f"cell {part['name']!r} has seeds={mine!r}, which must be some of the study's, {seeds}.")
    if not _are_different(found) or not all(one in budgets for one in found):
        raise ValueError(f"budgets={found!r} must be a list of some of {budgets}.")


def check_numbers(training: dict[str, Any]) -> None:
    """Refuse numbers and switches that no training can have. Raises: ValueError."""
    for name in ("steps", "warmup_steps"):
        if not _is_count(training[name], 0):
            raise ValueError(f"{name}={training[name]!r} must be a number of steps, 0 or more.")
    for name in ("learning_rate", "embedding_learning_rate", "max_grad_norm", "decay"):
        value, most = training[name], 1 if name == "decay" else math.inf
        if type(value) not in (int, float):
            raise ValueError(f"{name}={value!r} is no number to YAML. Write 2.0e-4, with the dot.")
        if not 0 <= value <= most or math.isinf(value):
            raise ValueError(f"{name}={value!r} must be a number of 0 or more{', 1 at most' if most == 1 else ''}.")
    if training["rows"] is not None and not _is_count(training["rows"], 1):
        raise ValueError(f"rows={training['rows']!r} must be a number of different rows, 1 or more.")
    for name in SWITCHES:
        if not isinstance(training[name], bool):
            raise ValueError(f"{name}={training[name]!r} must be true or false.")


def check_evaluation(evaluation: dict[str, Any], window: int | None) -> None:
    """Refuse measures that could not be taken after the training.

    Args:
        window: of a cell's rows; None if no book is measured.

    Raises: ValueError: a value outside its rule.
    """
    edges, lengths = evaluation["edges"], evaluation["passkey_lengths"]
    is_rising = isinstance(edges, list) and len(edges) > 1 and all(_is_count(edge, 0) for edge in edges)
    if not is_rising or edges[0] or any(first >= last for first, last in pairwise(edges)):
        raise ValueError(f"edges={edges!r} must be a list of positions that rises from 0.")
    if window is not None and not edges[-2] < window <= edges[-1]:
        raise ValueError(f"edges={edges} must end where rows do, at window={window}.")
    for key, least in dict(native_window=2, passkeys=1, memorised=1, ruler=1).items():
        value, may_lack = evaluation[key], key in ("memorised", "ruler")
        if not _is_count(value, least) and not (may_lack and value is None):
            raise ValueError(f"{key}={value!r} must be a whole number, {least} or more.")
    if lengths != [] and not (_are_different(lengths) and all(_is_count(length, 1) for length in lengths)):
        raise ValueError(f"passkey_lengths={lengths!r} must be a list of different numbers of tokens.")


def check_course(training: dict[str, Any], config: dict[str, Any], data: str, window: int) -> None:
    """Refuse options that could not be kept to.

    Args:
        training, config: of a cell, complete. data: "books" or "records". window: tokens of a row.

    Raises: ValueError: a value outside its rule, or options that exclude each other.
    """
    _check_dense_steps(training["dense_steps"])
    sizes, unscored, weight = training["group_sizes"], training["unscored"], training["dense_weight"]
    if sizes is not None and not (
        isinstance(sizes, list) and sizes and all(_is_count(one, 2) and one % 2 == 0 for one in sizes)
    ):
        raise ValueError(f"group_sizes={sizes!r} must be a list of even numbers of tokens, 2 or more each.")
    if training["rotating_layers"] is not None and not _is_count(training["rotating_layers"], 1):
        raise ValueError(f"rotating_layers={training['rotating_layers']!r} must be a number of layers, 1 or more.")
    if unscored is not None and not _is_count(unscored, 1):
        raise ValueError(f"unscored={unscored!r} must be a number of tokens, 1 or more.")
    smallest = min(sizes) if sizes else config.get("group_size")
    if unscored is not None and smallest is not None and unscored >= smallest:
        raise ValueError(f"unscored={unscored} must be below {smallest}, the tokens of the smallest group.")
    if weight is not None and (type(weight) not in (int, float) or not weight > 0):
        raise ValueError(f"dense_weight={weight!r} must be a number above 0.")
    if training["skip_positions"] and "skip_positions" in config:
        raise ValueError("skip_positions stands in config and in training. Say it in one of them.")
    if training["accumulation"] is not None and not _is_count(training["accumulation"], 1):
        raise ValueError(f"accumulation={training['accumulation']!r} must be a number of rows, 1 or more.")
    _check_parts(training, config, data, window)
    _check_effect(training, config)
    if data == "records" and (unscored is not None or weight is not None):
        raise ValueError("unscored and dense_weight weigh the tokens of books; the loss of records is on the answers.")
    if data == "records" and training["rows"] is not None:
        raise ValueError(f"rows={training['rows']} chooses rows of books; all records are trained on.")
    told_apart = unscored is not None or weight is not None
    if told_apart and (training["accumulation"] or 1) > 1 and config.get("dense_every"):
        raise ValueError(
            "unscored and dense_weight tell dense steps from others, and with accumulation dense_every makes single "
            "forwards dense. Use dense_steps in its place."
        )


def _check_dense_steps(found: Any) -> None:
    if found is None:
        return
    is_plan = isinstance(found, dict) and set(found) <= PLANS and set(found) - {"after"}
    if not is_plan or not all(_is_count(value, 0 if key == "after" else 1) for key, value in found.items()):
        raise ValueError(
            f"dense_steps={found!r} must have some of first, last and every, with numbers of 1 or more, and may have "
            f"after beside every."
        )
    if "after" in found and "every" not in found:
        raise ValueError(f"dense_steps={found!r}: after says where the counting of every begins, and every is missing.")


def _check_effect(training: dict[str, Any], config: dict[str, Any]) -> None:
    idle = [name for name in GROUPED if training[name] is not None]
    if config.get("attention_pattern") == "full" and idle:
        raise ValueError(f"attention_pattern='full' is dense in every step and has no groups: leave {idle} out.")
    if training["rotating_layers"] is not None and config.get("dense_layers") is not None:
        raise ValueError("rotating_layers takes the place of dense_layers. Leave one of them out.")
    if training["dense_weight"] is not None and not (training["dense_steps"] or config.get("dense_every")):
        raise ValueError("dense_weight weighs dense steps, and neither dense_steps nor dense_every makes one.")


def _check_parts(training: dict[str, Any], config: dict[str, Any], data: str, window: int) -> None:
    parts, factor, every = training["parts"], training["part_rate"], config.get("dense_every")
    if factor is not None and (type(factor) not in (int, float) or not factor > 0 or not parts):
        raise ValueError(f"part_rate={factor!r} must be a number above 0, beside parts.")
    if parts is None:
        return
    if not _is_count(parts, 2) or window % parts:
        raise ValueError(f"parts={parts!r} must be 2 or more, and divide {window}, the tokens of a row.")
    if every and (every - 1) % parts:
        raise ValueError(
            f"dense_every={every} counts forwards, and parts={parts} makes {parts} of every sparse row. For one dense "
            f"row in n, it must be {parts} * (n - 1) + 1."
        )
    others = [name for name in ALONE if training[name] not in (None, False)]
    if others or data == "records":
        raise ValueError(f"parts goes with rows of books and dense_every alone, and beside it stands {others or data}.")


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _are_different(values: Any) -> bool:
    """Whether it is a list of one value or more, none twice."""
    return isinstance(values, list) and len({str(value) for value in values}) == len(values) > 0

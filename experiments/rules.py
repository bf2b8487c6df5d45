"""What a cell's `training` may say of its course. Called by `cells` for each cell, before anything is trained.

What depends on the model (`rotating_layers` and its layers) is refused by `course`.
"""

from __future__ import annotations

from typing import Any

ALONE = "dense_steps", "group_sizes", "rotating_layers", "unscored", "dense_weight", "accumulation"
PLANS = {"every", "after", "first", "last"}


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
    for name in ("skip_positions", "liger"):
        if not isinstance(training[name], bool):
            raise ValueError(f"{name}={training[name]!r} must be true or false.")
    if training["accumulation"] is not None and not _is_count(training["accumulation"], 1):
        raise ValueError(f"accumulation={training['accumulation']!r} must be a number of rows, 1 or more.")
    _check_parts(training, config, data, window)
    if data == "records" and (unscored is not None or weight is not None):
        raise ValueError("unscored and dense_weight weigh the tokens of books; the loss of records is on the answers.")
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

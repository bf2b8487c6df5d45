"""Refuses settings of attention that would have no effect, or a wrong one: whoever gives one expects an effect."""

from __future__ import annotations

from typing import Any

RATIO = 0.25  # the group size as a share of the window, if nothing else is given


def check_effect(
    pattern: str,
    *,
    group_size: Any = None,
    group_size_ratio: float | None = None,
    chosen_blocks: Any = None,
    dense_layers: Any = None,
    dense_every: Any = None,
    skip_positions: Any = None,
    name: str = "pattern",
) -> None:
    """Refuse settings of which one makes another idle or wrong.

    The arguments are those of `configure_attention`; None, 0, False, an empty list and the default ratio are no
    settings.
    `name` is that of the argument or field that holds the pattern.

    Raises: ValueError.
    """
    ratio = None if group_size_ratio == RATIO else group_size_ratio
    if group_size is not None and ratio is not None:
        raise ValueError(
            f"group_size={group_size!r} and group_size_ratio={ratio!r} both give the size of a group, and only "
            f"group_size would be used. Give one of them."
        )
    if chosen_blocks is not None and pattern != "adaptive":
        raise ValueError(
            f"chosen_blocks={chosen_blocks!r} has no effect with {name}={pattern!r}: only 'adaptive' chooses blocks. "
            f"Leave it out, or use {name}='adaptive'."
        )
    if skip_positions and pattern != "local":
        raise ValueError(
            f"skip_positions={skip_positions!r} goes with {name}='local' alone, not with {pattern!r}: positions skip "
            f"inside groups, and no query may see two of them. Leave it out, or use {name}='local'."
        )
    if skip_positions and dense_layers:
        raise ValueError(
            f"skip_positions={skip_positions!r} and dense_layers={dense_layers!r} exclude each other: a dense layer "
            f"would see positions go back where a group begins. Leave one of them out; dense_every makes whole "
            f"forwards dense, in which no position skips."
        )
    if pattern == "full":
        given = dict(
            group_size=group_size, group_size_ratio=ratio, dense_layers=dense_layers or None, dense_every=dense_every
        )
        for other, value in given.items():
            if value:
                raise ValueError(
                    f"{other}={value!r} has no effect with {name}='full', which is dense in every layer and in every "
                    f"forward. Leave it out, or use another {name}."
                )

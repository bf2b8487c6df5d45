"""Options of LoRA's variants (`corda_config`, `kasa_config`, ...): nested configs, which a file holds as objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig

# Variants that no adapter of this type can be, and why. PEFT would fail on them when it makes a layer.
_IMPOSSIBLE = {
    "arrow_config": "routes between stock LoRA adapters, which peft's create_arrow_model puts together",
    "megatron_config": "is for layers of Megatron-LM, which no model of transformers has",
}
_NESTED = [
    each.name for each in dataclasses.fields(LoraConfig) if each.name.endswith("_config") or each.name == "use_bdlora"
]


def check_variants(config: LoraConfig) -> None:
    """Refuse options of a variant that are no object, or that no adapter of this type can have.

    Raises: ValueError.
    """
    for name in _NESTED:
        value = getattr(config, name)
        if value is not None and name in _IMPOSSIBLE:
            raise ValueError(f"{name}={value!r} {_IMPOSSIBLE[name]}. Leave it out.")
        if not (value is None or isinstance(value, dict) or _is_config(value)):
            raise ValueError(f"{name}={value!r} must be one of PEFT's configs, the dict of its fields, or None.")


@contextmanager
def as_value_errors(config: LoraConfig) -> Iterator[None]:
    """While PEFT reads the options of variants: what it cannot read is a `ValueError` that names them.

    PEFT builds a class from each object, so an unknown field, or a value of a wrong type, is Python's own error there.
    """
    given = {name: value for name in _NESTED if isinstance(value := getattr(config, name), dict) and value}
    try:
        yield
    except (TypeError, AttributeError, KeyError) as error:
        what = " or ".join(f"{name}={value!r}" for name, value in given.items()) or "A field of this config"
        raise ValueError(
            f"{what} cannot be read: {error}. Give what this version of peft takes, or leave it out."
        ) from error


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)

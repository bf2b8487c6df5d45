"""Turns a value of a recipe, or a word of the command line, into the type that a field is annotated with."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import yaml

# What YAML 1.1 reads as another number than people do: 010 is 8, and 1:30 is 90.
ODD_NUMBER = re.compile(r"[-+]?(0[\d_]+|\d[\d_]*(:\d+)+(\.\d*)?)")
WORDS = {"yes": True, "on": True, "no": False, "off": False}
THOUSANDS = re.compile(r"(\d+)k", re.IGNORECASE)


def convert(name: str, value: Any, kind: Any) -> Any:
    """The value as this type.

    Numbers may be text ("2e-4", which YAML reads as text), whole numbers may end with k ("32k" is 32768), a list of
    numbers may be written with commas, and a single value stands for a list of one. yes, no, on and off are booleans
    where text is not allowed.

    Args:
        name: the field's name, for errors.
        kind: an annotation: a class, Literal, Optional, Union, list, dict, an Enum or a dataclass.

    Raises: ValueError: the value is not of this type.
    """
    options = list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]
    if any(isinstance(option, type) and issubclass(option, enum.Enum) for option in options):
        options = [option for option in options if option is not str]  # which transformers adds, and does not take
    # The member that has the value's own type comes first, so that "1" stays text where text is allowed.
    for option in sorted(options, key=lambda option: not _is_own(value, option)):
        try:
            return _convert(name, value, option)
        except (TypeError, ValueError, OverflowError):
            continue
    _refuse_odd_number(name, value, options)
    raise ValueError(f"{name}={value!r} is not {_words(options)}.{_near(value, options)}")


def _refuse_odd_number(name: str, value: Any, options: list[Any]) -> None:
    """Refuse a number that YAML 1.1 and people read differently, also in a list, and say both."""
    numbers = [kind for kind in (int, float) if any(kind in (option, *get_args(option)) for option in options)]
    for each in value if isinstance(value, list) else [value]:
        if numbers and isinstance(each, str) and ODD_NUMBER.fullmatch(each):
            told = yaml.safe_load(each)
            written = "with colons" if ":" in each else "with a zero before it"
            meant = "" if isinstance(told, str) else f", which YAML 1.1 reads as {told}"
            plain = f"{int(each)}, or {told}" if meant and ":" not in each else "one plain number"
            raise ValueError(
                f"{name}={each!r} is not {_words(numbers)}: it is written {written}{meant}. Write {plain}."
            )


def _untyped(value: Any) -> Any:
    """A value whose parts have no types: words for true and false are read as YAML 1.1 reads them."""
    if isinstance(value, dict):
        return {key: _untyped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_untyped(each) for each in value]
    return WORDS.get(value.lower(), value) if isinstance(value, str) else value


def _near(value: Any, options: list[Any]) -> str:
    """The value that was probably meant."""
    allowed = [each for option in options if get_origin(option) is Literal for each in get_args(option)]
    enums = [option for option in options if isinstance(option, type) and issubclass(option, enum.Enum)]
    allowed += [each.value for option in enums for each in option]
    near = difflib.get_close_matches(str(value), map(str, allowed), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _is_own(value: Any, kind: Any) -> bool:
    plain = get_origin(kind) or kind
    return isinstance(plain, type) and type(value) is plain


def _convert(name: str, value: Any, kind: Any) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return value
    if kind is None or kind is type(None):
        return _check(value, value is None)
    if origin is Literal:
        # A placeholder such as "pissa_niter_[number of iters]" stands for any number.
        patterns = [re.sub(r"\\\[.*?\\\]", r"\\d+", re.escape(str(each))) for each in get_args(kind)]
        return _check(value, any(re.fullmatch(pattern, str(value)) for pattern in patterns))
    if origin in (list, tuple):
        members = get_args(kind)
        values = list(value) if isinstance(value, list | tuple) else [value]
        if isinstance(value, str) and not {int, float}.isdisjoint(members):  # 4096,8192 as other commands take it
            values = [part.strip() for part in value.split(",")]
        if origin is tuple and Ellipsis not in members:
            return tuple(convert(name, each, member) for each, member in zip(values, members, strict=True))
        return [convert(name, each, members[0]) for each in values]
    if origin is dict or kind is dict:
        return _check(_untyped(value), isinstance(value, dict))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value).value
    if dataclasses.is_dataclass(kind):
        return kind(**_check(_untyped(value), isinstance(value, dict)))
    return _plain(value, kind)


def _plain(value: Any, kind: type) -> Any:
    if kind is bool:
        value = WORDS.get(value.lower(), value) if isinstance(value, str) else value
        return _check(value, isinstance(value, bool))
    if kind in (int, float) and isinstance(value, str):
        _check(value, not ODD_NUMBER.fullmatch(value))
    if kind is int:
        if isinstance(value, str) and (thousands := THOUSANDS.fullmatch(value)):
            return int(thousands[1]) * 1024
        number = float(value)
        return _check(int(number), number == int(number) and not isinstance(value, bool))
    if kind is float:
        number = float(value)
        return _check(number, number == number and not isinstance(value, bool))
    if kind is str:
        return str(_check(value, isinstance(value, str | int | float) and not isinstance(value, bool)))
    return _check(value, isinstance(value, kind))


def _check(value: Any, is_right: bool) -> Any:
    if not is_right:
        raise ValueError
    return value


def _words(options: list[Any]) -> str:
    """What a type allows, in words."""
    words = []
    for option in options:
        origin = get_origin(option)
        if origin is Literal:
            words += [repr(each) for each in get_args(option)]
        elif isinstance(option, type) and issubclass(option, enum.Enum):
            words.append(f"one of {', '.join(str(each.value) for each in option)}")
        elif option is None or option is type(None):
            words.append("null")
        elif origin in (list, tuple):
            words.append(f"a list of {' or '.join(getattr(each, '__name__', str(each)) for each in get_args(option))}")
        else:
            plain = origin or option
            words.append(_NAMES.get(plain, getattr(plain, "__name__", str(plain))))
    return " or ".join(dict.fromkeys(words))


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}

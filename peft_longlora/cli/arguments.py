"""What the commands share: the description of a command, numbers, options of a model, and option names in errors."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

GIVEN = "_given"  # names of the options that were given, while options are parsed
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Command:
    """One command of `longlora`.

    Attributes:
        summary: its line in `longlora --help`. description, epilog: parts of its own help.
        add_options: adds its options to a parser. run: is called with the parsed options and returns the exit code.
        interrupted: the text that is printed if the user stops it.
        options: the option for a parameter of the library, if their names differ.
        takes_more: it reads options that the parser does not know; they are `more` of the parsed options.
    """

    name: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    description: str | None = None
    epilog: str | None = None
    interrupted: str = "Stopped."
    options: Mapping[str, str] = field(default_factory=dict)
    takes_more: bool = False


class Store(argparse.Action):
    """argparse's `store`, but an option that is given twice is refused, and a list of words grows."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Take the values of one use of the option."""
        given = vars(namespace).setdefault(GIVEN, set())
        is_again = option is not None and self.dest in given
        if is_again and self.nargs not in ("+", "*"):
            raise argparse.ArgumentError(self, "given twice. Give it once")
        given.add(self.dest)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), *values] if is_again else values)


class Switch(Store):
    """argparse's `store_true`, but a switch that is given twice is refused."""

    def __init__(self, **options: Any):
        super().__init__(nargs=0, default=False, **options)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Set the switch."""
        super().__call__(parser, namespace, True, option)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and no option is given twice: see `Store`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name, action in ((None, Store), ("store", Store), ("store_true", Switch)):
            self.register("action", name, action)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        """argparse's, without the note of what was given."""
        found, more = super().parse_known_args(*args, **kwargs)
        vars(found).pop(GIVEN, None)
        return found, more

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Errors about what the user gave (files, models, numbers) end a script as errors in its options do."""
        try:
            yield
        except (ValueError, OSError, ImportError, NotImplementedError) as error:
            self.error(" ".join(str(error).split()))


def add_model_options(parser: argparse.ArgumentParser, auto: str = "as in the file") -> None:
    """Add the options of the model that a command loads; `auto` says which type of numbers that is."""
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model", required=True, help="folder or Hub id of a base, or of a merged model")
    add("--adapter", help="folder or Hub id of a PEFT adapter")
    add("--tokenizer", help="folder or Hub id (default: the model's)")
    add("--dtype", default="auto", choices=DTYPES, help=f"auto: {auto} (%(default)s)")
    add("--device", help="cuda, cpu, ... (default: the GPU if there is one)")
    add("--attn-implementation", help="implementation of dense attention: sdpa, flash_attention_2, ...")


def model_options(args: argparse.Namespace) -> dict[str, str | None]:
    """The options of `add_model_options`, as `hub.load_model` takes them. The command adds the device."""
    names = ("model", "adapter", "tokenizer", "dtype", "attn_implementation")
    return {name: getattr(args, name) for name in names}


def say_options(text: str, args: argparse.Namespace, names: Mapping[str, str]) -> str:
    """A library error with option names in place of parameters: "model='x'" becomes "--model x".

    Args:
        names: as `Command.options`.
    """
    known = {name: name for name in vars(args)} | dict(names)
    for parameter, option in known.items():
        flag = f"--{option.replace('_', '-')}"
        text = re.sub(rf"(?<![\w./-]){parameter}=(?:True\b|\.\.\.)", flag, text)
        text = re.sub(rf"(?<![\w./-]){parameter}='([^']*)'", lambda found, flag=flag: f"{flag} {found[1]}", text)
        text = re.sub(rf"(?<![\w./-]){parameter}=(?=\S)", f"{flag} ", text)
    return text


def numbers(text: str) -> list[int]:
    """Parse numbers of 1 or more, such as 4096,8192 or 4k,8k."""
    parts = text.lower().split(",")
    try:
        found = [int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 4096,8192 or 4k,8k") from None
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return found


def tokens(text: str) -> int:
    """Parse one number of tokens, such as 4096 or 4k."""
    with contextlib.suppress(argparse.ArgumentTypeError):
        if len(found := numbers(text)) == 1:
            return found[0]
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more, such as 4096 or 4k")


def folder(text: str) -> Path:
    """Parse a path to a folder, which need not exist."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a path. Give a folder; . is the current one")
    return Path(text)


def percents(text: str) -> list[float]:
    """Parse percents; returns shares from 0 to 1."""
    try:
        found = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of percents such as 0,50,100") from None
    if not all(0 <= number <= 1 for number in found):
        raise argparse.ArgumentTypeError(f"{text!r} holds a percentage outside 0 to 100")
    return found


def count(text: str) -> int:
    """Parse a number of 0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """Parse a number of 1 or more."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def temperature(text: str) -> float:
    """Parse a temperature, 0 to 100."""
    return _number(text, 0, 100, "from 0 to 100")


def share(text: str) -> float:
    """Parse a share, above 0 and at most 1."""
    return _number(text, 1e-6, 1, "above 0 and up to 1")


def penalty(text: str) -> float:
    """Parse a repetition penalty, 0.1 to 10; 1 changes nothing."""
    return _number(text, 0.1, 10, "from 0.1 to 10")


def _number(text: str, low: float, high: float, rule: str) -> float:
    with contextlib.suppress(ValueError):
        if low <= float(text) <= high:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number {rule}")


def refuse_file(output: Path, files: tuple[str, ...] = ()) -> None:
    """Refuse an --output that is a file, or lies inside one, before anything is measured.

    Args:
        files: patterns for names of the files that will be written into it; none of them may be a folder.

    Raises: ValueError.
    """
    from peft_longlora.hub.writing import file_in_the_way

    if found := file_in_the_way(output):
        raise ValueError(f"--output {output}: {found} is a file. Give a folder.")
    if found := next((path for name in files for path in sorted(output.glob(name)) if path.is_dir()), None):
        raise ValueError(f"--output {output}: {found} is a folder, but a file of this name is written there. Move it.")

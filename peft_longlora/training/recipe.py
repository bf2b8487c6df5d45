"""A recipe: a YAML file and `--key value` pairs become checked options, before anything slow begins."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.training.learning_rates import no_effect, trains_whole
from peft_longlora.training.loader import Loader
from peft_longlora.training.names import NAMES, as_names
from peft_longlora.training.options import RunOptions
from peft_longlora.training.values import convert

RUN, ADAPTER, TRAINER = "run", "adapter", "trainer"
# Defaults of a long-context run where those of TRL's SFTConfig are others. docs/training.md says why.
DEFAULTS = {
    "packing": True,
    "packing_strategy": "bfd_split",
    "eval_packing": False,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 2e-4,
    "adam_beta2": 0.95,
    "logging_steps": 1.0,
    "save_steps": 100.0,
    "save_total_limit": 2,
}
REQUIRED = {
    "model": "the base, a folder or an id on the Hub",
    "data": "files, folders or ids of datasets",
    "context_length": "the window to extend to, in tokens, such as 32k",
}
FILLED_IN = {each.name for each in dataclasses.fields(LongLoraConfig) if "Filled in" in each.metadata.get("help", "")}
FILLED_IN |= {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "inference_mode"}
FILLED_IN |= {"runtime_config", "local_rank", "do_train", "do_eval", "do_predict"}
NO_KEYS = {
    **dict.fromkeys(FILLED_IN, "is filled in by the command"),
    "model_init_kwargs": "does not apply: model, dtype and four_bit say how the base is loaded",
    "revision": "is LoraConfig's; the base's is model_revision",
    "dataset_text_field": "is named text_field here",
    "hub_strategy": "does not apply: the adapter is pushed once, after it was measured",
    "hub_always_push": "does not apply: the adapter is pushed once, after it was measured",
    "dataset_kwargs": "does not apply: the rows are ready",
    "completion_only_loss": "does not apply: with kind: records the loss is on answers only",
    "assistant_only_loss": "does not apply: with kind: records the loss is on answers only",
    "include_num_input_tokens_seen": "is not needed: num_tokens of the log counts the whole run's tokens",
    "resume_from_checkpoint": "is not needed: a run goes on from the last checkpoint in output_dir",
}  # fmt: skip
ABOVE_ZERO = ("learning_rate", "num_train_epochs", "logging_steps", "save_steps", "eval_steps", "save_total_limit")
ABOVE_ZERO += ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
ABOVE_ZERO += ("eval_windows", "max_rows", "sequence_parallel", "embedding_learning_rate")
NOT_BELOW_ZERO = (
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_epsilon",
    "lora_dropout",
    "seed",
    "neftune_noise_alpha",
)


@dataclass
class Recipe:
    """Checked options of a run, by their keys.

    Attributes:
        name: the file's name without suffix.
        values: the keys that were given, and DEFAULTS.
    """

    name: str
    values: dict[str, Any]

    @property
    def run(self) -> RunOptions:
        """The options of model, data and evaluation."""
        return RunOptions(**self.of(RUN))

    @property
    def config(self) -> LongLoraConfig:
        """The adapter's config. Raises: ValueError, as LongLoraConfig."""
        return LongLoraConfig(task_type="CAUSAL_LM", **self.of(ADAPTER))

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.values["output_dir"])

    def of(self, owner: str) -> dict[str, Any]:
        """The values of one owner's keys."""
        return {key: value for key, value in self.values.items() if keys()[key].owner == owner}


@dataclass(frozen=True)
class Key:
    """One key: who owns it, its type, default and help."""

    name: str
    owner: str
    kind: Any
    default: Any
    help: str


@cache
def keys() -> dict[str, Key]:
    """All keys of recipes, by name.

    Raises: ImportError: trl is not installed.
    """
    try:
        from trl import SFTConfig
    except ImportError:
        raise ImportError("Training needs trl: pip install 'peft-longlora[trl]'") from None
    found: dict[str, Key] = {}
    for owner, kind in ((RUN, RunOptions), (ADAPTER, LongLoraConfig), (TRAINER, SFTConfig)):
        hints = get_type_hints(kind)
        for each in dataclasses.fields(kind):
            if each.init and each.name not in NO_KEYS and each.name not in found:
                has_factory = each.default_factory is not dataclasses.MISSING
                default = each.default_factory() if has_factory else each.default
                default = DEFAULTS.get(each.name, default)
                help = " ".join(str(each.metadata.get("help", "")).split())
                found[each.name] = Key(each.name, owner, hints[each.name], default, help)
    return found


def read_recipe(path: str | Path | None, words: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a YAML file and the pairs of the command line, which win.

    Args:
        path: the file, or the name of one of the package's recipes. None: only the pairs.
        words: such as ["--learning-rate", "1e-4", "--data", "a.txt", "b.txt", "--no-packing"].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not YAML; an unknown key (the message names the nearest); a value of a wrong type or outside its
            rule; a key that is given twice and is no list; a required key is missing.
    """
    name = "run" if path is None else _name(Path(path))
    values: dict[str, Any] = {}
    for pairs in (_read_file(Path(path)).items() if path else (), _read_words(words)):
        given: dict[str, Any] = {}
        for key, value in pairs:
            known = _find(key)
            if value is None and known.name in REQUIRED:
                continue  # `model:` without a value
            value = convert(known.name, value, known.kind)
            value = as_names(value) if known.name in NAMES else value
            if known.name in given:
                value = _joined(known, given[known.name], value)
            given[known.name] = value
        values |= given
    values = {**DEFAULTS, "output_dir": f"runs/{name}", **values}
    _check(values)
    recipe = Recipe(name, values)
    config = recipe.config  # refuses what LongLoraConfig refuses
    if recipe.run.embedding_learning_rate is not None and not trains_whole(config):
        raise ValueError(no_effect(recipe.run.embedding_learning_rate))
    return recipe


def _joined(key: Key, first: Any, second: Any) -> Any:
    """The value of a key that is given twice: a list of names, such as data, grows. Raises: ValueError."""
    if isinstance(first, list) and isinstance(second, list):
        return [*first, *second]
    raise ValueError(f"{key.name} is given twice: {first!r}, then {second!r}. Give it once.")


def _find(key: Any) -> Key:
    name = str(key).replace("-", "_")
    if reason := NO_KEYS.get(name):
        raise ValueError(f"{key}: this key {reason}. Leave it out.")
    if name not in keys():
        near = difflib.get_close_matches(name, keys(), n=1, cutoff=0.5)
        raise ValueError(f"{key}: no such key.{f' Did you mean {near[0]}?' if near else ''} --keys lists all.")
    return keys()[name]


def own_recipes() -> dict[str, Path]:
    """The package's recipes by their names: beside the package in a checkout, inside it after an installation."""
    package = Path(__file__).parents[1]
    return {path.stem: path for folder in (package.parent, package) for path in (folder / "recipes").glob("*.yaml")}


def _name(path: Path) -> str:
    """A recipe's name: that of its file without .yaml. Names have dots of their own, such as llama-3.1-8b-256k."""
    return path.name.removesuffix(".yaml").removesuffix(".yml")


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        path = own_recipes().get(_name(path), path)
    if (path / "config.json").is_file():
        raise ValueError(f"{path}: this is a model, not a recipe. Give it with --model {path}.")
    if not path.is_file():
        names = ", ".join(sorted(own_recipes()))
        raise FileNotFoundError(f"{path}: no such recipe. Give a .yaml file, or one of {names}.")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}: not YAML{where}: {getattr(error, 'problem', None) or error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a recipe is a list of `key: value` lines.")
    return found


def _read_words(words: list[str] | tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(key, value) pairs of a command line."""
    key, values = None, []
    for word in [*words, None]:
        if word is None or word.startswith("--"):
            if key is not None:
                yield _pair(key, values)
            key, values = word, []
            if word is not None and "=" in word:
                key, _, value = word.partition("=")
                values = [value]
        elif key is None:
            raise ValueError(f"{word}: a value without a key. Write --key value.")
        else:
            values.append(word)


def _pair(key: str, words: list[str]) -> tuple[str, Any]:
    name = key[2:].replace("-", "_")
    if not words:
        if name.startswith("no_") and name[3:] in keys():
            return name[3:], False
        return name, True
    try:
        values = [yaml.load(word, Loader) for word in words]
    except (yaml.YAMLError, ValueError, RecursionError):
        values = list(words)
    return name, values if len(values) > 1 else values[0]


def _check(values: dict[str, Any]) -> None:
    for name, what in REQUIRED.items():
        if not values.get(name):
            option = name.replace("_", "-")
            raise ValueError(f"{name} is missing: {what}. Write it into the recipe, or give --{option}.")
    for names, least, rule in ((ABOVE_ZERO, 0, "above 0"), (NOT_BELOW_ZERO, -1e-30, "0 or more")):
        for name in names:
            value = values.get(name)
            if value is not None and not value > least:
                raise ValueError(f"{name}={value!r} must be {rule}.")
            if value == float("inf") and name != "max_grad_norm":  # which then only logs the norm
                raise ValueError(f"{name}={value!r} must be {rule}, and finite.")
    if values.get("max_steps", -1) != -1 and values["max_steps"] < 1:
        raise ValueError(f"max_steps={values['max_steps']} must be 1 or more. Leave it out to count epochs.")
    window, length = values["context_length"], values.get("max_length")
    if length is not None and not 3 <= length <= window:
        raise ValueError(f"max_length={length}, the tokens of a row, must be 3 to context_length={window}.")
    if any(length < 2 for length in values.get("eval_lengths") or ()):
        raise ValueError(f"eval_lengths={values['eval_lengths']} must be 2 tokens or more.")

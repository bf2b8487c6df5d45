"""Loads a base, its tokenizer and an adapter, and refuses what does not fit.

Used by the evaluation and the chat; `longlora train` loads its parts with `load_part`.

Messages name arguments, such as `model='me/base'`; the command line replaces them by its options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_longlora.adapter.config import LongLoraConfig
from peft_longlora.adapter.files import check_on_hub, find, read_json
from peft_longlora.adapter.regexes import check_patterns
from peft_longlora.architecture import rows_of
from peft_longlora.rope.parameters import check_rope, window_of
from peft_longlora.rope.scale import scale_rope

DEFAULT_ROPE = "yarn"
PADDED = 0.9  # models have up to 2% more embeddings than tokens, to get a round number


@dataclass
class Loaded:
    """A model in evaluation mode and on its device, with its tokenizer.

    Attributes:
        model: the base, with the adapter if there is one.
        tokenizer: its tokenizer.
        native_window: tokens, before extension.
        window: tokens, after extension.
        notes: warnings about how the parts fit together.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    native_window: int
    window: int
    notes: list[str] = field(default_factory=list)


def load_model(
    model: str,
    adapter: str | None = None,
    *,
    tokenizer: str | None = None,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    context_length: int | None = None,
    rope_type: str | None = None,
) -> Loaded:
    """Load a base or a merged model, and an adapter on it.

    Args:
        model: a folder or an id on the Hub.
        adapter: the same, of any PEFT type.
        tokenizer: a folder or an id; None: the model's.
        dtype: "auto" (as in the file), "float32", "bfloat16" or "float16".
        device: None: the GPU if there is one.
        attn_implementation: transformers' name for the implementation of dense attention.
        context_length: tokens; rescale RoPE without an adapter, as `scale_rope` does.
        rope_type: how to rescale it; None: "yarn".

    Raises:
        ValueError: a part does not exist or does not fit, an option would have no effect, or the tokenizer has tokens
            that the model does not have.
    """
    place = find_device(device)
    check_rope(rope_type or DEFAULT_ROPE, None)
    if rope_type and not context_length:
        raise ValueError(
            f"rope_type={rope_type!r} has no effect without context_length=..."
            + (": an adapter has its own scaling. Leave it out." if adapter else ". Give both, or neither.")
        )
    if adapter and context_length:
        raise ValueError(
            f"context_length={context_length} and an adapter exclude each other: an adapter has its own window."
        )
    if (Path(model) / "adapter_config.json").is_file():
        raise ValueError(
            f"model={model!r} is an adapter. Give its base with model=..., and the adapter with adapter=..."
        )
    options = dict(dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True)
    base, found = load_part(AutoModelForCausalLM, model, "model", **options)
    words = load_part(AutoTokenizer, tokenizer or model, "tokenizer")
    check_tokenizer(base, words)
    native = window_of(base.config.get_text_config())
    notes = check_complete(model, found)
    known, rows = len(words.get_vocab()), rows_of(base.get_input_embeddings())
    if known < PADDED * rows:
        notes.append(
            f"The tokenizer knows {known} tokens and the model has {rows} embeddings: it may belong to another "
            f"model. Give the model's own tokenizer with tokenizer=..."
        )
    if adapter:
        base = _add_adapter(base, adapter, model, notes)
    elif context_length:
        if context_length <= native:
            raise ValueError(
                f"context_length={context_length} is not above the model's own window of {native} tokens: there is "
                f"nothing to rescale. Leave it out, or give more tokens."
            )
        scale_rope(base, context_length, rope_type=rope_type or DEFAULT_ROPE)
    base.to(place).eval()
    return Loaded(base, words, native, window_of(base.config.get_text_config()), notes)


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; with None the GPU if there is one.

    Raises: ValueError: PyTorch does not know the device, or it is not available.
    """
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={str(name)!r}: PyTorch sees no GPU here. Use cpu.")
        if torch.empty(1, device=place).is_meta:
            raise ValueError(f"device={str(name)!r} holds no numbers. Use cpu, cuda or another that does.")
    except (RuntimeError, AssertionError) as error:  # which error it is depends on the device
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"device={str(name)!r}: {reason}. Use cpu, cuda or another that this PyTorch has.") from None
    return place


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. For a CPU's memory PyTorch has no error class, only a text."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def check_tokenizer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens for which the model has no embeddings.

    Raises: ValueError.
    """
    rows = rows_of(model.get_input_embeddings())
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"The tokenizer ({tokenizer.name_or_path}) knows token {largest}, but the model has {rows} embeddings. "
            f"Give the tokenizer that belongs to the model with tokenizer=..."
        )


def check_place(name: str, what: str, revision: str | None = None) -> None:
    """Refuse a base or a tokenizer that is nowhere, before transformers looks for it.

    Raises: ValueError: the message begins with `what`.
    """
    if Path(name).is_dir():
        return
    if Path(name).is_absolute() or name.startswith((".", "~")):
        raise ValueError(f"{what}={name!r}: no such folder.")
    try:
        check_on_hub(name, "config.json", revision=revision)
    except ValueError as error:
        raise ValueError(f"{what}={error}") from error


def check_complete(model: str, found: dict[str, Any]) -> list[str]:
    """Refuse a model whose files lack weights: transformers makes random ones.

    Args:
        model: its name. found: what transformers' `output_loading_info` says.

    Returns: a note if the files hold weights that the model does not use.

    Raises: ValueError.
    """
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"model={model!r} cannot be loaded: its files lack {len(missing)} of its weights, the first being "
            f"{missing[0]}, which would be random. Get it again, or give one with a language model's output layer."
        )
    if unused := sorted(found["unexpected_keys"]):
        name = Path(model).name if Path(model).is_dir() else model  # notes are stored with results
        return [f"The files of {name!r} hold {len(unused)} weights that the model does not use ({unused[0]}, ...)."]
    return []


def load_part(factory: Any, name: str, what: str, **options: Any) -> Any:
    """A model, a config or a tokenizer, as one of transformers' auto classes loads it.

    Args:
        factory: the class. name: a folder or an id on the Hub. what: the name of the part, for errors.
        options: of its `from_pretrained`; those that are None are left out.

    Raises: ValueError: it cannot be loaded; the message has the reason in one line.
    """
    check_place(name, what, options.get("revision"))
    options = {key: value for key, value in options.items() if value is not None}
    try:
        return factory.from_pretrained(name, **options)
    except Exception as error:  # a damaged file may raise anything
        if _is_no_fault_of_file(error):
            raise
        raise ValueError(f"{what}={name!r} cannot be loaded: {_reason(error)}") from error


def _is_no_fault_of_file(error: Exception) -> bool:
    """Whether memory ran out or a package is missing, which is said in other words."""
    return is_out_of_memory(error) or isinstance(error, ImportError)


def _reason(error: Exception) -> str:
    """The error in one line. An error that is not made for users also gets its class and a cure."""
    reason = " ".join(str(error).split())[:600]
    if reason and isinstance(error, OSError | ValueError | RuntimeError) and not isinstance(error, RecursionError):
        return reason
    kind = type(error).__name__
    return f"{kind}: {reason or 'no more is known'}. A file is damaged or holds a value of a wrong type. Get it again."


def _add_adapter(base: PreTrainedModel, adapter: str, model: str, notes: list[str]) -> PeftModel:
    _check_adapter(adapter)
    try:
        config = PeftConfig.from_pretrained(adapter)
        if not isinstance(config, LongLoraConfig):  # which checks itself
            check_patterns(config, base)
        loaded = PeftModel.from_pretrained(base, adapter)
    except Exception as error:  # a damaged file may raise anything
        if _is_no_fault_of_file(error):
            raise
        raise ValueError(f"adapter={adapter!r} cannot be loaded on {model}: {_reason(error)}") from error
    if (named := config.base_model_name_or_path) and Path(named).name != Path(model).name:
        ours, theirs = (Path(name).name if Path(name).is_absolute() else name for name in (named, model))
        notes.append(f"The adapter names {ours!r} as its base, but is loaded on {theirs!r}.")
    return loaded


def _check_adapter(adapter: str) -> None:
    """Check an adapter's place and say what is wrong. PEFT only says that it finds no config."""
    try:
        path = find(adapter, CONFIG_NAME)
        if Path(adapter).is_dir() and not Path(adapter, WEIGHTS_NAME).is_file():
            find(adapter, SAFETENSORS_WEIGHTS_NAME)
    except ValueError as error:  # the message begins with the place
        raise ValueError(f"adapter={error}") from error
    try:
        read_json(path)
    except ValueError as error:
        raise ValueError(f"adapter={adapter!r}: {error}") from error

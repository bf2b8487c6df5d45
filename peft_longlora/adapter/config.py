"""`LongLoraConfig`: what a user sets. Everything of `LoraConfig` stays usable."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils import logging

from peft_longlora.adapter.files import _AGAIN, AdapterFile, read_json, refuse_link
from peft_longlora.attention.schedule import check_dense_every
from peft_longlora.kernels.groups import PATTERNS, check_pattern
from peft_longlora.rope.parameters import check_rope

# Of what an adapter's files mean; it grows when an older package would misread them.
FORMAT_VERSION = 1
_FILLED_IN_TOKENS = ("base_context_length", "applied_context_length", "applied_group_size", "vocab_size")

logger = logging.get_logger(__name__)


@dataclass
class LongLoraConfig(LoraConfig):
    """Configuration of LongLoRA (arXiv:2309.12307): LoRA, trainable embeddings and norms, S2-Attn and scaled RoPE.

    Example:
        >>> config = LongLoraConfig(r=16, lora_alpha=32, context_length=32768)
        >>> model = get_peft_model(model, config)  # model: AutoModelForCausalLM, attn_implementation="s2_attn"

    Raises:
        ValueError: a value outside its rule; the message names the field, the value, the rule and the cure.
    """

    context_length: int | None = field(
        default=None,
        metadata={"help": "The window to extend to, in tokens. None, or not above the base's own window: RoPE stays."},
    )
    rope_type: str = field(
        default="yarn",
        metadata={
            "help": "How RoPE is rescaled: 'linear' (Position Interpolation, the paper's), 'ntk' (theta raised once), "
            "'dynamic', 'yarn', 'llama3', 'longrope' (needs rope_parameters)."
        },
    )
    rope_parameters: dict[str, Any] | None = field(
        default=None, metadata={"help": "transformers' own dict, used as it is. Excludes rope_type."}
    )
    group_size: int | None = field(
        default=None,
        metadata={"help": "Tokens a group, even, 2 or more. None: group_size_ratio of the window, made even."},
    )
    group_size_ratio: float = field(
        default=0.25,
        metadata={
            "help": "Group size as a fraction, in (0, 1], of context_length, or of the base's own window where that is "
            "None. Never of the row at hand: a short document stays dense."
        },
    )
    attention_pattern: str = field(
        default="s2",
        metadata={"help": "'s2'; 'local' (groups, no shift); 'full' (dense while training too)."},
    )
    dense_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of layers that stay dense while training."}
    )
    dense_every: int | None = field(
        default=None,
        metadata={
            "help": "One training forward in so many, the last of them, is dense in every layer. None or 0: none is."
        },
    )
    train_embeddings: bool = field(
        default=True, metadata={"help": "Train a copy of the input embeddings, saved with the adapter."}
    )
    train_norms: bool = field(
        default=True, metadata={"help": "Train a copy of every normalisation module, saved with the adapter."}
    )
    base_context_length: int | None = field(
        default=None,
        metadata={"help": "Filled in when the adapter is made: the base's own window, checked when it is loaded."},
    )
    applied_rope_parameters: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Filled in when the adapter is made: the rope_parameters in force, applied when loaded."},
    )
    applied_context_length: int | None = field(
        default=None,
        metadata={"help": "Filled in when the adapter is made: the window in force, for the card."},
    )
    applied_group_size: int | None = field(
        default=None,
        metadata={"help": "Filled in when the adapter is made: the group size in force, for the card."},
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Filled in when the adapter is made: rows of the input embeddings, checked when loaded."},
    )

    format_version: int = field(
        default=FORMAT_VERSION,
        metadata={"help": "Filled in: the version of an adapter's format. Newer ones than the package's are refused."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LONGLORA
        if type(self.format_version) is not int or self.format_version < 1:
            raise ValueError(
                f"format_version={self.format_version!r} must be a whole number, 1 to {FORMAT_VERSION}. Leave it out "
                f"of a new config; an adapter_config.json that says so was changed by hand or is damaged: get it again."
            )
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version!r}: the adapter was written by a newer peft-longlora; this one "
                f"reads versions up to {FORMAT_VERSION}. Update it: pip install -U peft-longlora."
            )
        # Shapes of the file this config was read with; `model` compares them with the base before it touches it.
        self._file: AdapterFile | None = None
        # What the card says beyond this config (hub.use_longlora_card).
        self._card: Any = None
        for name in ("context_length", "group_size", *_FILLED_IN_TOKENS):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive number of tokens, or None.")
        if not isinstance(self.applied_rope_parameters, dict | None):
            raise ValueError(
                f"applied_rope_parameters={self.applied_rope_parameters!r} must be the dict that was filled in when "
                f"the adapter was made, or None."
            )
        for name in ("train_embeddings", "train_norms"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} must be True or False.")
        ratio_is_number = isinstance(self.group_size_ratio, int | float) and not isinstance(self.group_size_ratio, bool)
        if not ratio_is_number or not 0 < self.group_size_ratio <= 1:
            raise ValueError(
                f"group_size_ratio={self.group_size_ratio!r} is outside (0, 1]: it is a fraction of the window. "
                f"Use group_size for a number of tokens."
            )
        if self.attention_pattern not in PATTERNS:
            raise ValueError(
                f"attention_pattern={self.attention_pattern!r} is unknown. Use one of {', '.join(map(repr, PATTERNS))}."
            )
        check_pattern(2 if self.group_size is None else self.group_size, self.attention_pattern)
        check_rope(self.rope_type, self.rope_parameters)
        if self.dense_layers is not None and not (
            isinstance(self.dense_layers, list | tuple) and all(type(i) is int and i >= 0 for i in self.dense_layers)
        ):
            raise ValueError(f"dense_layers={self.dense_layers!r} must be a list of layer indices, 0 or more.")
        check_dense_every(self.dense_every)
        if self.layer_replication and self.dense_layers:
            raise ValueError(
                f"dense_layers={self.dense_layers!r} and layer_replication={self.layer_replication!r} cannot be used "
                f"together: replication numbers the layers anew. Leave one of them out."
            )
        if self.bias != "none" and self.train_norms:
            raise ValueError(
                f"bias={self.bias!r} and train_norms=True would train the biases of norms twice. Use bias='none', or "
                f"train_norms=False."
            )

        if self.trainable_token_indices is not None and self.train_embeddings:
            raise ValueError(
                "trainable_token_indices trains some rows of the embeddings, train_embeddings=True all of them. Set "
                "train_embeddings=False, or leave trainable_token_indices out."
            )
        self.refuse_second_use()

    def refuse_second_use(self) -> None:
        """A config that was filled in for one window and then edited would bring the old RoPE along.

        Raises: ValueError.
        """
        applied, base = self.applied_rope_parameters, self.base_context_length
        if applied is None or self.rope_parameters is not None or None in (base, self.context_length):
            return
        kind = "default" if self.rope_type == "ntk" else self.rope_type
        factor = applied.get("factor", self.context_length / base)
        is_edited = applied.get("rope_type") != kind or abs(factor * base - self.context_length) > 1
        is_edited = is_edited or (self.applied_context_length or self.context_length) != self.context_length
        if is_edited:
            raise ValueError(
                f"context_length={self.context_length} and rope_type={self.rope_type!r} do not fit "
                f"applied_rope_parameters={applied}, which were filled in when this config made an adapter. Make a new "
                f"LongLoraConfig, or set applied_rope_parameters=None."
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json and, beside it, the adapter's card (README.md).

        In a Trainer's checkpoint, checkpoint-<step>, also the card of the folder above, which the Trainer pushes.
        """
        super().save_pretrained(save_directory, **kwargs)
        from peft_longlora.hub.card import write_cards_of_save  # not at the top: the card reads configs

        write_cards_of_save(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the config of an adapter, and the table of contents of the weights that lie beside it.

        Raises:
            ValueError: there is no adapter, a file is damaged, a value is outside its rule, or a file is a link that
                leads out of the folder.
        """
        path = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if is_folder := Path(pretrained_model_name_or_path).is_dir():
            for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                refuse_link(path.with_name(name))
            if path.with_name(CONFIG_NAME).is_file():
                read_json(path.with_name(CONFIG_NAME))
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{CONFIG_NAME} of {pretrained_model_name_or_path} is damaged: {error}. {_AGAIN}"
            ) from error
        except ValueError as error:
            if error.__cause__ is None:  # a value in the config
                raise
            raise ValueError(
                f"{error}, neither in a folder nor on the Hub ('owner/name'). Check the name; if the repository is "
                f"private or gated, log in with `hf auth login` or set HF_TOKEN."
            ) from error
        if not is_folder:
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)
            try:  # PEFT loads the same file next, from the cache
                path = Path(
                    hf_hub_download(
                        pretrained_model_name_or_path, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub_kwargs
                    )
                )
            except EntryNotFoundError:
                return config
        if path.is_file():
            config._file = AdapterFile.read(path)
        return config

"""`LongLoraConfig`: the options that a user sets. All options of `LoraConfig` stay usable."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NoReturn

from peft import LoraConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from peft_longlora.adapter.consistency import check_together
from peft_longlora.adapter.files import AdapterFile, FileMissing, find, naming
from peft_longlora.adapter.filled_in import check_filled_in
from peft_longlora.adapter.inits import changes_base
from peft_longlora.adapter.rules import FORMAT_VERSION, RULES, plain
from peft_longlora.adapter.variants import as_value_errors, check_variants
from peft_longlora.attention.effect import RATIO
from peft_longlora.attention.schedule import check_dense_every
from peft_longlora.kernels.patterns import check_blocks, check_pattern, group_size_of
from peft_longlora.rope.parameters import check_rope

_IN_MEMORY = dict(default=None, init=False, repr=False, compare=False)


@dataclass
class LongLoraConfig(LoraConfig):
    """Configuration of LongLoRA (arXiv:2309.12307): LoRA, trainable embeddings and norms, S2-Attn and scaled RoPE.

    LoraConfig's own fields work as in PEFT; `target_modules` is by default every projection of attention (q, k, v, o).

    Args:
        context_length: The window to extend to, in tokens. If None or not above the base's window, RoPE is not changed.
        rope_type: How RoPE is rescaled: 'linear' (Position Interpolation, as in the paper), 'ntk' (theta raised once),
            'dynamic', 'yarn', 'llama3', 'longrope' (needs rope_parameters), 'learned' (a trained factor for each
            frequency, which starts as yarn's; merged models hold it as 'longrope').
        rope_parameters: The dict of transformers' configs, used unchanged. Excludes rope_type.
        group_size: Tokens in a group: even, 2 or more. None: group_size_ratio of the window, made even.
        group_size_ratio: Group size as a fraction, in (0, 1], of context_length, or of the base's own window if that is
            None. It is never a fraction of the row, so a short document stays dense.
        attention_pattern: 's2'; 'local' (groups without a shift); 'full' (dense in training too); 'window' (half a
            group back, and the first 128 tokens); 'adaptive' (blocks of keys chosen by content).
        chosen_blocks: How many blocks of 128 keys 'adaptive' chooses. None: at the cost of 's2', but at least 1.
        dense_layers: Indices of layers that stay dense in training.
        dense_every: n: one training forward in n (the n-th, the 2n-th, ...) is dense in every layer. None or 0: none
            is.
        skip_positions: For 'local': positions skip inside groups in training, so that a group sees the distances of the
            window (PoSE, arXiv:2309.10400).
        train_embeddings: Train a copy of the input embeddings, saved with the adapter.
        train_norms: Train a copy of every normalisation module, saved with the adapter.
        base_context_length: Filled in when the adapter is made: the base's own window, checked when it is loaded.
        applied_rope_parameters: Filled in when the adapter is made: the rope_parameters in use, applied when it is
            loaded.
        applied_context_length: Filled in when the adapter is made: the window in use, for the card.
        applied_group_size: Filled in when the adapter is made: the group size in use, for the card.
        base_rope_parameters: Filled in when the adapter is made: the base's own rope_parameters, checked when it is
            loaded.
        base_layout: Filled in when the adapter is made: the base's model_type, heads, KV heads and numbers in a head,
            checked when it is loaded.
        vocab_size: Filled in when the adapter is made: rows of the input embeddings, checked when loaded.
        format_version: Filled in: the version of the adapter's format. A version newer than the package's is refused.

    Examples:
        >>> config = LongLoraConfig(r=16, lora_alpha=32, context_length=32768)
        >>> model = get_peft_model(model, config)  # model: AutoModelForCausalLM, attn_implementation="s2_attn"

    Raises:
        ValueError: a value outside its rule; the message names the field, the value, the rule and the cure.
    """

    context_length: int | None = field(
        default=None,
        metadata={
            "help": "The window to extend to, in tokens. If None or not above the base's window, RoPE is not changed."
        },
    )
    rope_type: str = field(
        default="yarn",
        metadata={
            "help": "How RoPE is rescaled: 'linear' (Position Interpolation, as in the paper), 'ntk' (theta raised "
            "once), 'dynamic', 'yarn', 'llama3', 'longrope' (needs rope_parameters), 'learned' (a trained factor for "
            "each frequency, which starts as yarn's; merged models hold it as 'longrope')."
        },
    )
    rope_parameters: dict[str, Any] | None = field(
        default=None, metadata={"help": "The dict of transformers' configs, used unchanged. Excludes rope_type."}
    )
    group_size: int | None = field(
        default=None,
        metadata={"help": "Tokens in a group: even, 2 or more. None: group_size_ratio of the window, made even."},
    )
    group_size_ratio: float = field(
        default=RATIO,
        metadata={
            "help": "Group size as a fraction, in (0, 1], of context_length, or of the base's own window if that is "
            "None. It is never a fraction of the row, so a short document stays dense."
        },
    )
    attention_pattern: str = field(
        default="s2",
        metadata={
            "help": "'s2'; 'local' (groups without a shift); 'full' (dense in training too); 'window' (half a group "
            "back, and the first 128 tokens); 'adaptive' (blocks of keys chosen by content)."
        },
    )
    chosen_blocks: int | None = field(
        default=None,
        metadata={"help": "How many blocks of 128 keys 'adaptive' chooses. None: at the cost of 's2', but at least 1."},
    )
    dense_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of layers that stay dense in training."}
    )
    dense_every: int | None = field(
        default=None,
        metadata={
            "help": "n: one training forward in n (the n-th, the 2n-th, ...) is dense in every layer. None or 0: none "
            "is."
        },
    )
    skip_positions: bool = field(
        default=False,
        metadata={
            "help": "For 'local': positions skip inside groups in training, so that a group sees the distances of the "
            "window (PoSE, arXiv:2309.10400)."
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
        metadata={"help": "Filled in when the adapter is made: the rope_parameters in use, applied when it is loaded."},
    )
    applied_context_length: int | None = field(
        default=None,
        metadata={"help": "Filled in when the adapter is made: the window in use, for the card."},
    )
    applied_group_size: int | None = field(
        default=None,
        metadata={"help": "Filled in when the adapter is made: the group size in use, for the card."},
    )
    base_rope_parameters: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Filled in when the adapter is made: the base's own rope_parameters, checked when it is loaded."
        },
    )
    base_layout: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Filled in when the adapter is made: the base's model_type, heads, KV heads and numbers in a head, "
            "checked when it is loaded."
        },
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Filled in when the adapter is made: rows of the input embeddings, checked when loaded."},
    )

    format_version: int = field(
        default=FORMAT_VERSION,
        metadata={
            "help": "Filled in: the version of the adapter's format. A version newer than the package's is refused."
        },
    )

    # The following fields exist only in memory; they are never saved.
    card: Any = field(**_IN_MEMORY, metadata={"help": "Options of the adapter's card: `hub.card.CardOptions`."})
    model_tags: list[str] | None = field(
        **_IN_MEMORY, metadata={"help": "The base's own list of tags; `add_model_tags` extends it."}
    )
    file: AdapterFile | None = field(
        **_IN_MEMORY, metadata={"help": "The table of contents of the weights file beside adapter_config.json."}
    )
    folder: str | None = field(
        **_IN_MEMORY, metadata={"help": "Where the adapter was loaded from or last saved: its results lie there."}
    )
    resolved_for: str | None = field(
        **_IN_MEMORY, metadata={"help": "The model_type for which target_modules and modules_to_save were filled in."}
    )

    made_at: float | None = field(
        **_IN_MEMORY, metadata={"help": "When this config made an adapter in this process, in seconds of the clock."}
    )

    on_save: ClassVar[Callable[[LongLoraConfig, str], None]] = lambda config, folder: None
    """Called with the folder after a config was saved; `register` puts the card's writer here."""

    def __post_init__(self) -> None:
        self._refuse_newer()
        for name, (rule, is_right) in RULES.items():
            setattr(self, name, value := plain(getattr(self, name)))
            if not is_right(value):
                raise ValueError(f"{name}={value!r} {rule}.")
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        check_variants(self)
        with as_value_errors(self):
            super().__post_init__()
        self.peft_type = PeftType.LONGLORA
        check_pattern(2 if self.group_size is None else self.group_size, self.attention_pattern)
        self.chosen_blocks = check_blocks(self.chosen_blocks)
        check_rope(self.rope_type, self.rope_parameters)
        if self.applied_rope_parameters is not None:
            check_rope("yarn", self.applied_rope_parameters)  # as `rope_parameters`, whatever its type
        if self.dense_every is not None:
            self.dense_every = check_dense_every(self.dense_every)
        check_together(self)
        self._register_custom_module({nn.Module: refuse_other_tuner})
        check_filled_in(self)

    def _refuse_newer(self) -> None:
        if isinstance(self.format_version, int) and self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version!r}: the adapter was written by a newer peft-longlora; this one "
                f"reads versions up to {FORMAT_VERSION}. Update it: pip install -U peft-longlora."
            )

    def group_size_on(self, window: int) -> int:
        """The group size G in tokens, on a base with this window."""
        return group_size_of(self.group_size, self.group_size_ratio, self.context_length or window)

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation changes the base's own weights, as PiSSA does."""
        return changes_base(self.init_lora_weights)

    @property
    def init_weights(self) -> Any:
        """PEFT's name for `init_lora_weights` in other types; its conversion to a plain LoRA sets this one."""
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value: Any) -> None:
        self.init_lora_weights = value

    def to_dict(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return {name: value for name, value in super().to_dict().items() if name not in _NOT_SAVED}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json and, beside it, the adapter's card (README.md).

        In a Trainer's checkpoint (checkpoint-<step>) it also writes the card of the parent folder, which the Trainer
        pushes.

        Raises: ValueError: it was edited since it made the adapter, and could not be read again.
        """
        check_filled_in(self)
        super().save_pretrained(save_directory, **kwargs)
        self.on_save(save_directory)
        self.folder = str(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the config of an adapter, and the table of contents of its weights file.

        Raises:
            ValueError: there is no adapter, a file is damaged, a value is outside its rule, or a file is a link out of
                the folder.
        """
        hub_options, _, _ = cls._split_kwargs(kwargs)
        place = dict(subfolder=subfolder, **hub_options)
        with naming(find(pretrained_model_name_or_path, CONFIG_NAME, **place)):
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        with suppress(FileMissing):  # PEFT loads the same file next, from the folder or from the Hub's cache
            config.file = AdapterFile.read(find(pretrained_model_name_or_path, SAFETENSORS_WEIGHTS_NAME, **place))
            config.folder = str(config.file.path.parent)
        return config


def refuse_other_tuner(target: nn.Module, adapter_name: str, **_: Any) -> NoReturn:
    """What a tuner other than `LongLoraModel` gets if it asks the config how to make a layer.

    Raises: NotImplementedError.
    """
    raise NotImplementedError(
        f"Adapter {adapter_name!r} is a LONGLORA adapter, and the tuner that loads it (X-LoRA, or peft's LoraModel) "
        f"knows only LoRA: it would drop the RoPE scaling, the trained embeddings and norms, and S2-Attn. Make a "
        f"plain LoRA adapter of it with peft_longlora.export_lora(model, folder), and load the base again: this one "
        f"is half made."
    )


_NOT_SAVED = {each.name for each in fields(LongLoraConfig) if not each.init}

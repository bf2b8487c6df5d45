"""The keys of a recipe that are neither LongLoraConfig's nor the Trainer's: model, data, evaluation, card."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def is_on_hub(source: str) -> bool:
    """Whether a source of data is the id of a dataset: there is no such file or folder."""
    return not Path(source).exists()


@dataclass
class RunOptions:
    """What a run trains, on which data, and how it is measured. The help of each field says what it means."""

    model: str = field(default="", metadata=_help("The base: a folder, or an id on the Hub. Required."))
    data: list[str] = field(
        default_factory=list, metadata=_help("Files, folders, or ids of datasets on the Hub. Required.")
    )
    about: dict[str, Any] | None = field(
        default=None, metadata=_help("Facts for readers (hardware, hours, memory); --dry-run prints them.")
    )
    model_revision: str | None = field(default=None, metadata=_help("Branch or commit of the base on the Hub."))
    tokenizer: str | None = field(default=None, metadata=_help("Folder or id of the tokenizer. None: the base's."))
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata=_help("Type of the base's weights. auto: bfloat16 on a GPU, float32 on a CPU.")
    )
    four_bit: bool = field(default=False, metadata=_help("Keep the base in 4 bits (bitsandbytes, nf4)."))
    attn_backend: str | None = field(
        default=None, metadata=_help("Kernel of sparse layers, such as flash_attention_4. None: the fastest.")
    )
    dense_attention: str | None = field(
        default=None,
        metadata=_help(
            "transformers' attention for evaluation. None: as without this package; fastest: the fastest installed."
        ),
    )
    fit_memory: bool | None = field(
        default=None,
        metadata=_help("Checkpoint only as many blocks as the GPU needs. None: yes, for one process on a GPU."),
    )
    embedding_learning_rate: float | None = field(
        default=None,
        metadata=_help(
            "Learning rate of what is trained whole (embeddings, norms, the factors of a learned RoPE), which wants a "
            "lower one. None: learning_rate."
        ),
    )
    kind: Literal["text", "records"] = field(
        default="text",
        metadata=_help("text: continued pre-training. records: instruction tuning, with a loss on answers only."),
    )
    split: str = field(default="train", metadata=_help("Split of a dataset on the Hub."))
    data_config: str | None = field(default=None, metadata=_help("Configuration of a dataset on the Hub."))
    text_field: str = field(default="text", metadata=_help("The field of a record that holds a document."))
    skip_empty: bool = field(default=False, metadata=_help("Leave out empty documents, instead of stopping."))
    repositories: bool = field(
        default=False, metadata=_help("Folders are source trees: each repository is one document.")
    )
    too_long: Literal["truncate", "drop", "error"] = field(
        default="truncate",
        metadata=_help("Of records longer than a row: cut the middle of their prompt, leave them out, or stop."),
    )
    max_rows: int | None = field(
        default=None, metadata=_help("Stop reading after so many rows, for a dataset larger than what is trained on.")
    )
    sequence_parallel: int = field(
        default=1, metadata=_help("How many processes share each row, for rows that are too long for one GPU.")
    )
    eval_data: list[str] | None = field(
        default=None, metadata=_help("Held-out data of the same kind, measured after training.")
    )
    eval_split: str = field(default="test", metadata=_help("Split of eval_data on the Hub."))
    eval_lengths: list[int] | None = field(
        default=None,
        metadata=_help("Lengths of windows for perplexity, tokens. None: the new window, its half, and its quarter."),
    )
    eval_windows: int = field(
        default=8, metadata=_help("The most windows that are measured of each document and length.")
    )
    license: str | None = field(default=None, metadata=_help("Licence of the adapter, for its card. None: the base's."))
    language: list[str] | None = field(default=None, metadata=_help("Languages of the data, for the card, such as en."))
    tags: list[str] | None = field(default=None, metadata=_help("Further tags of the card."))
    overwrite: bool = field(
        default=False, metadata=_help("Begin anew in an output_dir that holds a run, and delete its checkpoints.")
    )

    @property
    def data_on_hub(self) -> list[str]:
        """The ids of datasets among `data`."""
        return [source for source in self.data if is_on_hub(source)]

"""How many of a data set's tokens a Trainer's rows hold: TRL's packing and `max_length` cut documents silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from peft_longlora.data.encoding import encode_all

logger = logging.get_logger(__name__)

BATCH = 64  # documents tokenised at a time


class TokensHeldCallback(TrainerCallback):
    """Report at the start of training how many of a data set's tokens the rows hold; warn if some are missing.

    Args:
        dataset: the data set of the Trainer. Its rows have "input_ids", "messages", "prompt" and "completion", or a
            text.
        text_field: the name of the text.

    Attributes:
        held, total: tokens of the rows and of the data set, once training has begun. The tokens that a trainer adds to
            each document count as held.

    Examples:
        >>> trainer = SFTTrainer(model, args=args, train_dataset=dataset, callbacks=[TokensHeldCallback(dataset)])
    """

    def __init__(self, dataset: Iterable[Mapping[str, Any]], text_field: str = "text") -> None:
        self.dataset, self.text_field = dataset, text_field
        self.held: int | None = None
        self.total: int | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count, and report on the first process.

        Raises: ValueError: the data set has no column that can be counted, or there is no tokenizer.
        """
        if not state.is_world_process_zero:
            return
        rows = train_dataloader.dataset
        if not hasattr(rows, "__len__"):
            logger.warning("The rows are a stream, so it is not known how many tokens of the data set they will hold.")
            return
        if processing_class is None:
            raise ValueError("TokensHeldCallback needs a tokenizer: give the Trainer processing_class=tokenizer.")
        self.held = sum(len(row["input_ids"]) for row in rows)
        self.total = count_tokens(self.dataset, processing_class, self.text_field)
        text = f"The rows hold {self.held:,} tokens, and the data set has {self.total:,}"
        if self.held >= self.total:
            logger.info(f"{text}.")
            return
        logger.warning(
            f"{text}: {1 - self.held / self.total:.1%} of it is not trained on. TRL keeps the first max_length tokens "
            f"of each document (max_length={getattr(args, 'max_length', None)}, "
            f"packing_strategy={getattr(args, 'packing_strategy', None)!r}). packing_strategy='bfd_split' keeps all of "
            f"them, and so do rows made by peft_longlora.data.to_windows."
        )


def count_tokens(
    dataset: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, text_field: str = "text"
) -> int:
    """The number of tokens of a data set in one of the forms that trainers accept; see `TokensHeldCallback`.

    Args:
        dataset: rows with "input_ids", "messages", "prompt" and "completion", or a text.
        tokenizer: the model's.
        text_field: the column of the text.

    Raises:
        ValueError: a row has none of the columns.
    """
    total, texts = 0, []
    for row in dataset:
        if "input_ids" in row:
            total += len(row["input_ids"])
        elif turns := row.get("messages") or _turns(row):
            total += len(tokenizer.apply_chat_template(turns, return_dict=False, tokenizer_kwargs={"verbose": False}))
        elif "prompt" in row:
            total += len(tokenizer(row["prompt"] + row["completion"], verbose=False)["input_ids"])
        elif text_field in row:
            texts.append(row[text_field])
            if len(texts) == BATCH:
                total += sum(map(len, encode_all(tokenizer, texts)))
                texts = []
        else:
            raise ValueError(
                f"The data set has the columns {sorted(row)}, and none of 'input_ids', 'messages', 'prompt' or "
                f"{text_field!r}. Name its text: text_field=..."
            )
    return total + sum(map(len, encode_all(tokenizer, texts)))


def _turns(row: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """The messages of a conversation that comes as prompt and completion."""
    return row["prompt"] + row["completion"] if isinstance(row.get("prompt"), list) else None

"""`LongContextEvalCallback`: the same numbers while a model trains, in the Trainer's own log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_longlora.eval.corpus import Corpus
from peft_longlora.eval.passkey import Passkey
from peft_longlora.eval.perplexity import Perplexity
from peft_longlora.eval.results import collect_cells
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks import Task


class LongContextEvalCallback(TrainerCallback):
    """Measure long-context tasks during training and log them as eval_{task}_{length}, such as eval_perplexity_32768.

    TensorBoard, W&B, trackio and every other reporter of the Trainer sees them. Attention is dense while measuring, and
    the model trains on as before. With several processes each measures everything, so that sharded models work too.

    Args:
        trainer: whose log is written.
        data: documents for perplexity: files, folders or ids, as `read_documents` takes them. None: no perplexity.
        lengths: tokens of windows and prompts.
        every_steps: measure whenever so many optimizer steps are done; None: whenever the Trainer evaluates.
        max_windows: of each document and length.
        passkey_depths: parts of the text before the key, 0 to 1; an empty list leaves the passkey out.
        tasks: more tasks of `peft_longlora.eval`.
        tokenizer: None: the trainer's processing_class.

    Raises:
        ValueError: nothing to measure, no tokenizer, or every_steps is None and the Trainer never evaluates.

    Example:
        >>> trainer.add_callback(LongContextEvalCallback(trainer, data="books/", lengths=[8192, 32768]))
    """

    def __init__(
        self,
        trainer: Trainer,
        data: str | list[str] | None = None,
        lengths: Iterable[int] = (),
        *,
        every_steps: int | None = None,
        max_windows: int | None = 1,
        passkey_depths: Iterable[float] = (0.1, 0.5, 0.9),
        tasks: Iterable[Task] = (),
        tokenizer: Any = None,
    ):
        self.trainer = trainer
        self.every_steps = every_steps
        self.tokenizer = tokenizer or trainer.processing_class
        lengths, depths = list(lengths), list(passkey_depths)
        self.tasks: list[Task] = list(tasks)
        if data is not None:
            self.tasks.append(Perplexity(Corpus(data), lengths, max_windows=max_windows))
        if depths:
            self.tasks.append(Passkey(lengths=lengths, depths=depths, seeds=1))
        if not self.tasks or (not lengths and not list(tasks)):
            raise ValueError(f"lengths={lengths} and data={data!r} leave nothing to measure. Give lengths.")
        if self.tokenizer is None:
            raise ValueError("The Trainer has no processing_class. Pass tokenizer=...")
        if every_steps is None and trainer.args.eval_strategy == "no":
            raise ValueError("eval_strategy='no' never evaluates. Pass every_steps=..., or set eval_strategy.")
        subject = Subject.of(trainer.accelerator.unwrap_model(trainer.model), self.tokenizer)
        for task in self.tasks:  # what cannot be read or measured is said before training begins
            task.data()
            task.check(subject)

    def measure(self) -> dict[str, float]:
        """Measure now, and give {"eval_{task}_{length}": value}."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        subject = Subject.of(model, self.tokenizer)
        with subject.evaluating(), self.trainer.compute_loss_context_manager():
            records = [item.measure() for task in self.tasks for item in task.items(subject)]
        values = {}
        for cell in collect_cells(records).values():
            task, _, _, metric, length, group = cell.name
            if group is None:
                name = task if metric in ("perplexity", "accuracy", "recall") else f"{task}_{metric}"
                values[f"eval_{name}" + (f"_{length}" if length else "")] = cell.sums()[1].value()
        return values

    def _log(self) -> None:
        self.trainer.log(self.measure())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure with each evaluation, unless every_steps was given."""
        if self.every_steps is None:
            self._log()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure every so many steps."""
        if self.every_steps and state.global_step % self.every_steps == 0:
            self._log()

"""`LongContextEvalCallback`: the same numbers while a model trains, in the Trainer's own log."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_longlora.eval.corpus import Corpus
from peft_longlora.eval.report.cells import Cell, collect_cells
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.passkey import Passkey
from peft_longlora.eval.tasks.perplexity import Perplexity
from peft_longlora.eval.tasks.task import Task
from peft_longlora.sequence.switch import unshared


class LongContextEvalCallback(TrainerCallback):
    """Measure long-context tasks during training and log them as eval_{task}_{length}, such as eval_perplexity_32768.

    Where a task has several data sets or protocols they stand in the name (eval_topics_5_topics,
    eval_perplexity_documents_32768), and so does the base where it is measured beside (eval_native_base_8192).
    TensorBoard, W&B, trackio and every other reporter of the Trainer sees them. Attention is dense while measuring, and
    the model trains on as before. With several processes each measures everything, so that sharded models work too, and
    those whose ranks share a sequence while they train.
    Measured with the Trainer's own evaluations, they can choose the best checkpoint (`metric_for_best_model`) and stop
    training early, by an `EarlyStoppingCallback` that is added after this one.

    Args:
        trainer: whose log is written.
        data: documents for perplexity: files, folders or ids, as `read_documents` takes them. None: no perplexity.
        lengths: a list of tokens of windows and prompts.
        every_steps: measure whenever so many optimizer steps are done, 1 or more; None: whenever the Trainer evaluates.
        max_windows: of each document and length.
        passkey_depths: a list of parts of the text before the key, 0 to 1; an empty one leaves the passkey out.
        tasks: more tasks of `peft_longlora.eval`.
        tokenizer: None: the trainer's processing_class.

    Raises:
        ValueError: nothing to measure, no tokenizer, every_steps is None and the Trainer never evaluates, or the
            Trainer's metric_for_best_model is one of these numbers and would be missing, or choose the worst.

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
        if every_steps is not None and not (_is_number(every_steps, Integral) and every_steps >= 1):
            raise ValueError(f"every_steps={every_steps!r} must be 1 or more, or None: with each evaluation.")
        lengths = _list("lengths", lengths, Integral, "[8192, 32768]")
        depths = _list("passkey_depths", passkey_depths, Real, "[0.1, 0.5, 0.9]")
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
        self._check_best(trainer.args)
        subject = Subject.of(trainer.accelerator.unwrap_model(trainer.model), self.tokenizer)
        for task in self.tasks:  # what cannot be read or measured is said before training begins
            task.data()
            task.check(subject)

    def measure(self) -> dict[str, float]:
        """Measure now, and give {"eval_{task}_{length}": value}."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        subject = Subject.of(model, self.tokenizer)
        with unshared(model), subject.evaluating(), self.trainer.compute_loss_context_manager():
            records = [item.measure() for task in self.tasks for item in task.items(subject)]
        cells = [cell for cell in collect_cells(records).values() if cell.name[-1] is None]
        return {_name(cell, cells, subject.variant): cell.sums()[1].value() for cell in cells}

    def _check_best(self, args: TrainingArguments) -> None:
        """Refuse what would choose no checkpoint, or the worst, when hours have passed."""
        best = (args.metric_for_best_model or "").removeprefix("eval_")
        if not any(best.startswith(f"{task.name}_") for task in self.tasks):
            return
        if self.every_steps is not None:
            raise ValueError(
                f"metric_for_best_model={best!r} is asked for when the Trainer evaluates, and every_steps="
                f"{self.every_steps} measures at other times. Leave every_steps out, and set eval_steps."
            )
        if best.startswith("perplexity_") and args.greater_is_better:  # the Trainer's default for all but losses
            raise ValueError(
                f"metric_for_best_model={best!r} with greater_is_better=True keeps the worst checkpoint. Pass "
                f"greater_is_better=False."
            )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measure with each evaluation, unless every_steps was given, and add to the metrics that it returns."""
        if self.every_steps is None:
            values = self.measure()
            self.trainer.log(dict(values))  # which adds to what it is given
            if metrics is not None:
                metrics.update(values)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure every so many steps."""
        if self.every_steps and state.global_step % self.every_steps == 0:
            self.trainer.log(self.measure())


def _name(cell: Cell, cells: list[Cell], variant: str) -> str:
    """eval_{task}_{length}, with the metric, data and protocol where there are several, and "base" for the base."""
    task, dataset, protocol, metric, length, _ = cell.name
    alike = {other.name[1:3] for other in cells if other.name[0] == task and other.name[3:5] == (metric, length)}
    parts = [
        task,
        "base" if cell.variant == "base" and variant != "base" else "",
        dataset if len({data for data, _ in alike}) > 1 else "",
        protocol if len({other for data, other in alike if data == dataset}) > 1 else "",
        metric if metric not in ("perplexity", "accuracy", "recall") else "",
        str(length or ""),
    ]
    return "_".join(["eval", *filter(None, parts)])


def _list(name: str, values: Any, kind: Any, example: str) -> list[Any]:
    """The values as a list.

    Raises: ValueError: they are none, or not numbers; numpy's are.
    """
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name}={values!r} is no list. Give one, such as {example}.")
    found = list(values)
    if bad := [value for value in found if not _is_number(value, kind)]:
        raise ValueError(f"{name}={found!r}: {bad[0]!r} is no number. Give a list such as {example}.")
    return [value.item() if hasattr(value, "item") else value for value in found]  # whose repr and JSON are a number's


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)

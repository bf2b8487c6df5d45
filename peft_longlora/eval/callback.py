"""`LongContextEvalCallback`: the numbers of an evaluation while a model trains, in the Trainer's log."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_longlora.data.digests import refuse_shared
from peft_longlora.eval.corpus import Corpus
from peft_longlora.eval.report.cells import Cell, collect_cells
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.passkey import Passkey
from peft_longlora.eval.tasks.perplexity import Perplexity
from peft_longlora.eval.tasks.task import Task
from peft_longlora.sequence.switch import unshared


class LongContextEvalCallback(TrainerCallback):
    """Measure long-context tasks during training and log them as eval_{task}_{length}, such as eval_perplexity_32768.

    If a task has several data sets or protocols, they are part of the name (eval_topics_5_topics,
    eval_perplexity_documents_32768). The same holds for the base if it is measured too (eval_native_base_8192).
    TensorBoard, W&B, trackio and all other reporters of the Trainer get the numbers. Attention is dense while it
    measures; then training continues as before. With several processes each one measures everything, so sharded models
    work, and models whose ranks share sequences.

    If it measures with the Trainer's own evaluations, the numbers can choose the best checkpoint
    (`metric_for_best_model`), and an `EarlyStoppingCallback` that you add after this one can stop training early.

    Args:
        trainer: the Trainer whose log gets the numbers.
        data: documents for perplexity: files, folders or ids, as for `read_documents`. None: no perplexity.
        lengths: lengths of windows and prompts, in tokens.
        every_steps: measure after every so many optimizer steps, 1 or more; None: when the Trainer evaluates.
        max_windows: the most windows of each document and length.
        passkey_depths: parts of the text before the key, 0 to 1; with an empty list there is no passkey task.
        tasks: further tasks of `peft_longlora.eval`.
        tokenizer: None: the trainer's processing_class.

    Raises:
        ValueError: `data` holds a document of the trainer's rows, if `load_rows` made them; there is nothing to measure
            or no tokenizer; every_steps is None and the Trainer never evaluates;
            or metric_for_best_model is one of these numbers but would be missing, or would choose the worst checkpoint.

    Examples:
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
            raise ValueError(f"every_steps={every_steps!r} must be 1 or more, or None to measure with each evaluation.")
        lengths = _list("lengths", lengths, Integral, "[8192, 32768]")
        depths = _list("passkey_depths", passkey_depths, Real, "[0.1, 0.5, 0.9]")
        self.tasks: list[Task] = list(tasks)
        if data is not None:
            corpus = Corpus(data)
            refuse_shared(trainer.train_dataset, corpus.digests, "data")
            self.tasks.append(Perplexity(corpus, lengths, max_windows=max_windows))
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
        for task in self.tasks:  # refuses what cannot be read or measured before training begins
            task.data()
            task.check(subject)

    def measure(self) -> dict[str, float]:
        """Measure now. Returns {"eval_{task}_{length}": value}."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        subject = Subject.of(model, self.tokenizer)
        with unshared(model), subject.evaluating(), self.trainer.compute_loss_context_manager():
            records = [item.measure() for task in self.tasks for item in task.items(subject)]
        cells = [cell for cell in collect_cells(records).values() if cell.name[-1] is None]
        return {_name(cell, cells, subject.variant): cell.sums()[1].value() for cell in cells}

    def _check_best(self, args: TrainingArguments) -> None:
        """Refuse a metric_for_best_model that would choose no checkpoint, or the worst one, after hours."""
        best = (args.metric_for_best_model or "").removeprefix("eval_")
        if not any(best.startswith(f"{task.name}_") for task in self.tasks):
            return
        if self.every_steps is not None:
            raise ValueError(
                f"metric_for_best_model={best!r} is needed when the Trainer evaluates, but every_steps="
                f"{self.every_steps} measures at other times. Leave every_steps out, and set eval_steps."
            )
        if best.startswith("perplexity_") and args.greater_is_better:  # the Trainer's default for everything but losses
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
        """Measure with each evaluation, unless every_steps was given, and add the numbers to its metrics."""
        if self.every_steps is None:
            values = self.measure()
            self.trainer.log(dict(values))  # a copy, because `log` adds to the dict
            if metrics is not None:
                metrics.update(values)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure after every `every_steps` steps."""
        if self.every_steps and state.global_step % self.every_steps == 0:
            self.trainer.log(self.measure())


def _name(cell: Cell, cells: list[Cell], variant: str) -> str:
    """eval_{task}_{length}, with metric, data and protocol if there are several, and "base" for the base."""
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

    Raises: ValueError: it is not a list, or holds something that is not a number (numpy's numbers are allowed).
    """
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name}={values!r} is not a list. Give a list such as {example}.")
    found = list(values)
    if bad := [value for value in found if not _is_number(value, kind)]:
        raise ValueError(f"{name}={found!r}: {bad[0]!r} is not a number. Give a list such as {example}.")
    # Plain numbers have a plain repr and JSON.
    return [value.item() if hasattr(value, "item") else value for value in found]


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)

"""`train`: a recipe's run from its data to its results. Everything that can be refused is refused before the weights.

recipe -> arguments -> tokenizer -> sketch (model without weights) -> rows -> model -> trainer -> finish.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from peft_longlora.data.digests import check_held_out, refuse_shared
from peft_longlora.data.loading import load_rows
from peft_longlora.eval.corpus import Corpus
from peft_longlora.hub.loading import is_out_of_memory
from peft_longlora.hub.trainers import use_longlora_card
from peft_longlora.memory.advice import explain_out_of_memory
from peft_longlora.memory.fit import fit_memory
from peft_longlora.sequence.trainer import SequenceParallelMixin
from peft_longlora.training.arguments import make_arguments
from peft_longlora.training.checkpoints import begin_output, open_output
from peft_longlora.training.completed import MEASURE, PUSH, SAVE, is_complete, missing_parts, restore
from peft_longlora.training.finish import finish, push
from peft_longlora.training.held_out import check_apart
from peft_longlora.training.identity import check_trained_on, note_trained_on, trained_on
from peft_longlora.training.learning_rates import LearningRatesMixin
from peft_longlora.training.machine import NOT_CHECKED, check_machine
from peft_longlora.training.meter import Meter, MeteredMixin
from peft_longlora.training.model import Sketch, as_float, load_adapted, load_tokenizer, sketch
from peft_longlora.training.outlook import OutlookCallback
from peft_longlora.training.places import check_places
from peft_longlora.training.recipe import Recipe
from peft_longlora.training.stopping import StopCallback
from peft_longlora.training.tokens import TokenCounter

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

STOPPED = 130


@dataclass
class Plan:
    """A run that was checked and can begin.

    Attributes:
        calls_fit_memory: whether `fit_memory` chooses what is checkpointed.
        last: the checkpoint from which the run goes on.
        missing: of a run that is complete, what it still lacks; None: it is not complete.
        held_out: for kind "records", and for text if the Trainer evaluates while it trains.
    """

    recipe: Recipe
    arguments: SFTConfig
    calls_fit_memory: bool
    tokenizer: PreTrainedTokenizerBase
    sketch: Sketch
    rows: Dataset
    held_out: Dataset | None
    corpus: Corpus | None
    last: Path | None
    missing: list[str] | None

    def __str__(self) -> str:
        """The recipe, what the data holds, and what is trained."""
        recipe = self.recipe
        lines = [f"{name}: {value}" for name, value in sorted(recipe.values.items()) if name != "hub_token"]
        lines += [f"Data: {self.rows.info.description}"]
        if self.corpus is not None:
            lines.append(f"Held out: {self.corpus.summary().documents:,} documents")
        elif self.held_out is not None:
            lines.append(f"Held out: {self.held_out.info.description}")
        share = self.sketch.trained / self.sketch.total
        lines.append(f"Trained: {self.sketch.trained:,} of {self.sketch.total:,} parameters ({share:.2%})")
        if self.missing is not None:
            lines.append(self.ended)
        elif self.last is not None:
            lines.append(f"Goes on from {self.last}")
        return "\n".join(lines)

    @property
    def ended(self) -> str:
        """A line on a run that is complete."""
        rest = f"missing, and made now: {', '.join(self.missing)}" if self.missing else "nothing is missing"
        return (
            f"The run is complete with {self.last}, so nothing is trained; {rest}. To train further, raise "
            f"max_steps or num_train_epochs; to begin anew, --overwrite."
        )


def train(recipe: Recipe, *, dry_run: bool = False, say: Callable[[str], None] = print) -> int:
    """Train, evaluate, write card and results, and push if the recipe says so.

    Args:
        recipe: as `read_recipe` gives it.
        dry_run: check all that shows without the weights, say what would be done and what is not checked.
        say: prints a line, in the main process only.

    Returns: 0, or 130 if a signal stopped the run; then a checkpoint is kept, and the same recipe goes on from it.

    Raises:
        ValueError, NotImplementedError, ImportError, OSError: the recipe, its data or its model is refused, or a step
            does not fit into memory.
    """
    plan = make_plan(recipe, dry_run=dry_run)
    if plan.arguments.process_index != 0:
        say = _silent
    if dry_run:
        say(f"{plan}\n{NOT_CHECKED}")
        return 0
    say(f"Data: {plan.rows.info.description}")
    if plan.arguments.process_index == 0:
        begin_output(recipe)
        note_trained_on(recipe.output_dir, trained_on(recipe, plan.rows, plan.sketch.commit))
    try:
        return _run(plan, say) if plan.missing is None else _run_again(plan, say)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) and str(error):  # fit_memory says what fits
            raise ValueError(str(error)) from error
        if not is_out_of_memory(error):
            raise
        what = str(error).partition("\n")[0].rstrip(".") if isinstance(error, torch.OutOfMemoryError) else ""
        raise ValueError(
            f"Out of memory ({what or ' '.join(str(error).split())[:120] + ' ...'}). Use a smaller context_length, "
            f"four_bit, gradient_checkpointing, or more GPUs."
        ) from error


def make_plan(recipe: Recipe, *, dry_run: bool = False) -> Plan:
    """Check a recipe and prepare its rows; loads no weights.

    Args:
        dry_run: write nothing into the output folder.

    Raises: ValueError, NotImplementedError, ImportError, OSError: as `train`.
    """
    options = recipe.run
    check_apart(options)
    check_places(recipe)
    last = open_output(recipe)
    tokenizer = load_tokenizer(options)
    made = sketch(options, recipe.config)  # before the arguments, after which DeepSpeed splits every new model
    arguments, calls_fit_memory = make_arguments(recipe)
    check_machine(recipe, arguments)
    read: dict[str, Any] = dict(kind=options.kind, config=options.data_config, quiet=True)
    if options.kind == "text":
        read |= dict(field=options.text_field, skip_empty=options.skip_empty, repositories=options.repositories)
    else:
        read |= dict(too_long=options.too_long)
    held_out = corpus = None
    missing = missing_parts(recipe, last) if is_complete(last, arguments) else None
    with arguments.main_process_first(desc="making rows"):
        most = dict(split=options.split, max_rows=options.max_rows)
        rows = load_rows(options.data, tokenizer, arguments.max_length, **most, **read)
        is_evaluating = arguments.eval_strategy != "no" or arguments.eval_on_start
        if options.eval_data and (options.kind == "records" or is_evaluating):
            with _naming_eval_data(options.eval_data):
                held_out = load_rows(
                    options.eval_data, tokenizer, arguments.max_length, split=options.eval_split, **read
                )
        if last is not None:
            check_trained_on(recipe, trained_on(recipe, rows, made.commit, stores=not dry_run))
    if is_evaluating and held_out is None:
        raise ValueError("eval_strategy and eval_on_start need eval_data: the held-out data. Give it.")
    if options.eval_data and options.kind == "text":
        where = (options.eval_split, options.data_config, options.text_field, options.repositories)
        corpus = Corpus(options.eval_data, *where)
        with _naming_eval_data(options.eval_data):
            corpus.summary()  # refuses what cannot be read
        refuse_shared(rows, corpus.digests, "eval_data")
    elif held_out is not None:
        check_held_out(rows, held_out, "eval_data")
    return Plan(recipe, arguments, calls_fit_memory, tokenizer, made, rows, held_out, corpus, last, missing)


def make_trainer(plan: Plan, say: Callable[[str], None]) -> SFTTrainer:
    """Load the model, and make the trainer with its log, its card and its end."""
    from trl import SFTTrainer

    class RecipeTrainer(MeteredMixin, SequenceParallelMixin, LearningRatesMixin, SFTTrainer, TokenCounter):
        """TRL's trainer, whose log holds the loss by position, tokens per second and the run's tokens; processes may
        share rows."""

    options, arguments = plan.recipe.run, plan.arguments
    set_seed(arguments.seed)  # the adapter's random numbers are the same whatever came before
    model = load_adapted(options, plan.recipe.config, arguments.device.type == "cuda")
    trainer = RecipeTrainer(
        model,
        arguments,
        train_dataset=plan.rows,
        eval_dataset=plan.held_out,
        processing_class=plan.tokenizer,
        callbacks=[StopCallback(), OutlookCallback(say)],
        meter=Meter(arguments.max_length),
        sequence_parallel_size=options.sequence_parallel,
        embedding_learning_rate=options.embedding_learning_rate,
    )
    if options.four_bit:
        as_float(model)
    facts = dict(
        license=options.license, datasets=options.data_on_hub or None, language=options.language, tags=options.tags
    )
    use_longlora_card(trainer, **facts)
    if plan.calls_fit_memory and plan.missing is None:
        tokens = arguments.max_length * arguments.per_device_train_batch_size
        stay = arguments.gradient_accumulation_steps > 1
        memory = fit_memory(trainer.model, tokens, loss=fused_loss(arguments), accumulates=stay)
        say(f"Memory:\n{memory}")
    return trainer


def _run(plan: Plan, say: Callable[[str], None]) -> int:
    trainer = make_trainer(plan, say)
    stop = next(one for one in trainer.callback_handler.callbacks if isinstance(one, StopCallback))
    if plan.last is not None:
        say(f"Going on from {plan.last}.")
    with stop.listening(), explain_out_of_memory(trainer.model):
        trainer.train(resume_from_checkpoint=str(plan.last) if plan.last else None)
    step = trainer.state.global_step
    if stop.signal is not None and step < trainer.state.max_steps:
        say(
            f"Stopped after step {step}. {trainer.args.output_dir}/checkpoint-{step} is kept; the same command goes on."
        )
        return STOPPED
    finish(trainer, plan.recipe, plan.corpus, say)
    return 0


def _run_again(plan: Plan, say: Callable[[str], None]) -> int:
    """Make what a completed run lacks, and train nothing. The base is loaded only if it is needed."""
    say(plan.ended)
    is_saved, is_measured = (part not in plan.missing for part in (SAVE, MEASURE))
    if not (is_saved and is_measured):
        trainer = make_trainer(plan, say)
        restore(trainer, plan.recipe.output_dir, plan.last, is_saved)
        finish(trainer, plan.recipe, plan.corpus, say, is_saved=is_saved, is_measured=is_measured)
    elif PUSH in plan.missing and plan.arguments.process_index == 0:
        push(plan.arguments, plan.recipe.run, say)
    return 0


def fused_loss(arguments: SFTConfig) -> Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]:
    """The loss of a step as TRL's trainer computes it, for `fit_memory`: without the logits of a whole row.

    Args:
        arguments: the trainer's.

    Returns: a function of the model and ids (1, S).
    """
    from trl.trainer import utils

    fused = {"fused_lm_head": True} if hasattr(utils, "add_fused_lm_head") else {}

    def loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=arguments.bf16):
            return model(input_ids=ids, labels=ids, use_cache=False, **fused).loss

    return loss


@contextmanager
def _naming_eval_data(names: list[str]) -> Iterator[None]:
    """Errors of reading name the key: a recipe may bring held-out data that its user never named."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"eval_data, {', '.join(names)}, cannot be read: {str(error).rstrip('.')}. It is what the adapter is "
            f"measured on. Give your own held-out data (--eval-data other-books/), or --eval-data null to measure "
            f"nothing."
        ) from error


def _silent(text: str) -> None:
    """Says nothing: only the main process speaks."""

"""After training: the adapter is saved and measured, its card and results are written, and it is pushed if asked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from peft_longlora.eval.corpus import Corpus
from peft_longlora.eval.evaluation import evaluate
from peft_longlora.eval.processes import Processes
from peft_longlora.eval.report.tables import make_report
from peft_longlora.eval.subject import Subject
from peft_longlora.eval.tasks.perplexity import Perplexity
from peft_longlora.hub.card import try_card, write_card
from peft_longlora.hub.folder import push_folder
from peft_longlora.hub.provenance import write_training
from peft_longlora.hub.results import copy_results
from peft_longlora.sequence.switch import unshared
from peft_longlora.training.options import RunOptions, is_on_hub
from peft_longlora.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

EVALUATION = "evaluation"


def finish(
    trainer: Trainer,
    recipe: Recipe,
    corpus: Corpus | None,
    say: Callable[[str], None],
    *,
    is_saved: bool = False,
    is_measured: bool = False,
) -> None:
    """Save, measure, write the card, and push.

    Args:
        corpus: held-out documents; None: there are none.
        is_saved, is_measured: whether an earlier run has done it.
    """
    folder = Path(trainer.args.output_dir)
    if not is_saved:
        trainer.save_model()
        trainer.save_state()
        say(f"The adapter is in {folder}.")
        if trainer.is_world_process_zero():
            _tell(trainer, recipe.run, folder)
        trainer.accelerator.wait_for_everyone()
    if not is_measured:
        _measure(trainer, recipe.run, corpus, folder, say)
    if recipe.values.get("push_to_hub"):
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            push(trainer.args, recipe.run, say)
    leave(trainer)


def leave(trainer: Trainer) -> None:
    """End a run in all of its processes together. The trainer cannot train any more.

    Args:
        trainer: of which everything is saved that is wanted.
    """
    # DDP goes first. If it were the last to hold the group of processes, it would wait for gloo's thread with Python's
    # lock in its hands, and that thread may be waiting for the lock.
    trainer.accelerator.free_memory()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.wait_for_everyone()  # a process that leaves while the first still works can end the job
    trainer.accelerator.end_training()


def _tell(trainer: Trainer, options: RunOptions, folder: Path) -> None:
    """Put the data and the training on the card, without paths of this machine."""
    args, state = trainer.args, trainer.state
    local = [Path(name).resolve().name for name in options.data if not is_on_hub(name)]
    read = trainer.train_dataset.info.description.split(";")[0]  # what follows may name files
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows = rows * args.world_size // options.sequence_parallel
    lines = [f"Not on the Hub: {', '.join(local)}"] if local else []
    lines += [f"Documents or records: {read}"] if read else []
    lines += [f"Training: {state.global_step:,} steps of {rows:,} rows, learning rate {args.learning_rate:g}"]
    if options.embedding_learning_rate is not None:
        lines[-1] += f" ({options.embedding_learning_rate:g} for what is trained whole)"
    tokens = state.num_input_tokens_seen  # 0: the run began in a version that did not count over all starts
    lines[-1] += f", {tokens:,} tokens" if tokens else ""
    write_training(folder, lines)
    model = trainer.accelerator.unwrap_model(trainer.model)
    try_card(model.peft_config[model.active_adapter], folder)


def _measure(
    trainer: Trainer, options: RunOptions, corpus: Corpus | None, folder: Path, say: Callable[[str], None]
) -> None:
    if corpus is not None:
        _measure_texts(trainer, options, corpus, folder, say)
    elif trainer.eval_dataset is not None:
        say(f"Loss of held-out answers, dense attention: {trainer.evaluate()['eval_loss']:.4f}")
    else:
        say("Nothing was measured, because the recipe names no eval_data.")


def _measure_texts(
    trainer: Trainer, options: RunOptions, corpus: Corpus, folder: Path, say: Callable[[str], None]
) -> None:
    """Perplexity by length and position, and at the base's own window beside the base, with dense attention."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    subject = Subject.of(model, trainer.processing_class)
    subject.sources = (options.model, str(folder))  # what was trained is what was saved
    subject.description["adapter"] = folder.name
    window = subject.window
    lengths = sorted(set(options.eval_lengths or [max(2, window // 4), max(2, window // 2), window]))
    tasks = [
        Perplexity(corpus, lengths, max_windows=options.eval_windows),
        Perplexity(corpus, None, with_base=True, name="native", max_windows=options.eval_windows),
    ]
    count = trainer.args.world_size
    processes = Processes(device=model.device)
    with ExitStack() as stack:
        output = folder / EVALUATION
        if count > 1 and not _is_sharded(trainer):  # every process has the whole model, so they share the windows
            processes = Processes(trainer.args.process_index, count, model.device, trainer.accelerator)
        elif count > 1 and not trainer.is_world_process_zero():  # all run every forward, and one writes
            output = Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(unshared(model))
        stack.enter_context(trainer.compute_loss_context_manager())
        results = evaluate(subject, tasks, output, processes=processes, overwrite=True)
    if results is not None and trainer.is_world_process_zero():
        copy_results(output, folder)
        config = model.peft_config[model.active_adapter]
        config.card = replace(config.card, results=output)
        write_card(config, folder)
        say(make_report(results))
        say(f"Results and plots are in {output}, and on the card {folder / 'README.md'}.")


def _is_sharded(trainer: Trainer) -> bool:
    """Whether each process holds a part of the weights, so that all must run every forward together."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def push(args: TrainingArguments, options: RunOptions, say: Callable[[str], None]) -> None:
    """Push the output folder, to `hub_model_id` or a repository with the folder's name."""
    folder = Path(args.output_dir)
    pushed = push_folder(
        folder,
        args.hub_model_id or folder.name,
        license=options.license,
        datasets=options.data_on_hub or None,
        language=options.language,
        private=args.hub_private_repo,
        token=args.hub_token,
        revision=args.hub_revision,
    )
    say(f"Pushed: {pushed.commit.commit_url}")

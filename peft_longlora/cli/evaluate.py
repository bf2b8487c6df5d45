"""`longlora eval`: measure a model, with or without an adapter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import (
    Command,
    add_model_options,
    count,
    folder,
    model_options,
    numbers,
    percents,
    positive,
    refuse_file,
    tokens,
)
from .tasks import OWN_TASKS, make_tasks, tasks_that_read

if TYPE_CHECKING:
    from peft_longlora import LongLoraConfig

INCOMPLETE = 3  # exit code of an evaluation without the lengths that ran out of memory


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `longlora eval`."""
    add = parser.add_argument
    add(
        "--tasks",
        default="perplexity,passkey",
        help=f"any of {', '.join(OWN_TASKS)}; a RULER task such as ruler_vt; a task of lm-eval (%(default)s)",
    )
    add("--lengths", type=numbers, default=[4096], help="tokens of windows and prompts, as 4096,8192 or 4k,8k (4k)")
    add(
        "--output",
        required=True,
        type=folder,
        help="folder for results; the same run in it continues, another that has ended moves to earlier-1 in it",
    )
    add("--overwrite", action="store_true", help="delete the old results in --output first")
    add("--with-base", action="store_true", help="measure the base too: both in one table and in one plot a task")
    add("--card", action="store_true", help="show the results in the adapter's card (README.md)")
    add("--seed", type=int, default=0, help="seed of generated prompts (%(default)s)")
    add_model_options(parser, "as in the file, on a CPU float32")
    _add_extension(parser)
    _add_documents(parser)
    _add_prompts(parser)
    _add_harness(parser)


def _add_extension(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the window").add_argument
    add("--attention", default="dense", choices=["dense", "sparse"], help="sparse: the adapter's pattern (dense)")
    add("--context-length", type=tokens, help="rescale RoPE to this window in tokens, as 16k, without an adapter")
    add("--rope-type", help="how --context-length rescales: yarn, ntk, linear, ... (yarn)")


def _add_documents(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(f"documents ({', '.join(tasks_that_read('data'))})").add_argument
    add("--data", nargs="+", help=".txt, .md, .pdf, .jsonl, .json, .parquet, folders of such files, or a Hub id")
    add("--repositories", action="store_true", help="folders are source trees: each repository is a document")
    add(
        "--trained-on",
        nargs="+",
        help="for memorised: the training text, beside --data that was not trained on (--data)",
    )
    add("--unseen", nargs="+", help="for memorised: text that was not trained on, if --data was")
    add("--split", default="train", help="split of a dataset on the Hub (%(default)s)")
    add("--data-config", help="configuration of a dataset on the Hub")
    add("--text-field", default="text", help="the field of a record that holds the document (%(default)s)")
    add(
        "--protocol",
        default="documents",
        choices=["documents", "longlora", "both"],
        help="protocol of perplexity (documents)",
    )
    add("--stride", type=count, help="tokens between windows (documents: half a window; longlora: 256); 0: no overlap")
    add("--buckets", type=numbers, help="edges of the ranges of positions (default: 512 and its doublings)")
    add("--max-windows", type=positive, help="measure only the first N windows of each document (default: all)")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompts").add_argument
    quarters = [0, 0.25, 0.5, 0.75, 1]
    add("--depths", type=percents, default=quarters, help="depths of passkey and needle, percents (0,25,50,75,100)")
    add("--seeds", type=positive, default=2, help="keys for each length and depth (%(default)s)")
    add(
        "--samples",
        type=positive,
        help="prompts of a ruler task and length (20), records of a file (all), passages (100)",
    )
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    add("--topics", help="LongChat's records")
    add("--multidoc", help="lost-in-the-middle's records")
    add("--places", type=percents, default=quarters, help="places of the gold passage, percents (0,25,50,75,100)")
    add("--longqa", help="LongAlpaca's or LongBench's records")
    add("--longqa-prompts", help="LongBench's config/dataset2prompt.json")


def _add_harness(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("lm-eval").add_argument
    add("--limit", type=positive, help="ask only the first N questions of each task")
    add("--include-path", help="a folder of task files")
    add("--num-fewshot", type=count, help="examples before a question (default: the task's own number)")


def run(args: argparse.Namespace) -> int:
    """Measure, write the results and print the table."""
    from peft_longlora import eval as suite
    from peft_longlora.eval.journal import Journal
    from peft_longlora.eval.report.tables import make_report
    from peft_longlora.eval.tasks.prompts import check_shortest

    if args.card and (args.adapter is None or not Path(args.adapter).is_dir()):
        given = f", not {args.adapter!r}" if args.adapter else ": give --adapter"
        raise ValueError(f"--card needs an adapter in a folder{given}.")
    if args.with_base and args.adapter is None and args.context_length is None:
        raise ValueError("--with-base needs --adapter or --context-length: without them the model is the base.")
    tasks = make_tasks(args)
    refuse_file(args.output)
    processes = suite.Processes.of_environment(args.device)
    if processes.is_main:
        Journal(args.output).check()
    for task in tasks:
        task.data()  # refuses bad data before a model is loaded
    check_shortest(tasks, args.tokenizer or args.model)
    window = {name: getattr(args, name) for name in ("attention", "context_length", "rope_type")}
    subject = suite.load_subject(**model_options(args), **window, device=processes.device)
    config = _config_of_card(args.adapter) if args.card else None
    settings = suite.Settings(seed=args.seed)
    results = suite.evaluate(
        subject, tasks, args.output, settings=settings, overwrite=args.overwrite, processes=processes
    )
    if results is None:
        return 0
    plots = " and plots" if any(args.output.glob("*.png")) else ""
    written = f"{args.output}: results.json, results.md, samples.jsonl{plots}"
    if config is not None:
        written += f"\n{_write_card(config, args.adapter, args.output)}"
    print(make_report(results), written, sep="\n")
    if not results.unmeasured:
        return 0
    print(
        f"longlora eval: out of memory, left out of the results: {', '.join(results.unmeasured)}. Everything else is "
        f"measured and kept. With fewer --lengths the same command is complete; with more memory it measures these.",
        file=sys.stderr,
    )
    return INCOMPLETE


def _config_of_card(adapter: str) -> LongLoraConfig:
    """The config of an adapter, for its card.

    Raises: ValueError: it is not a LongLoRA adapter.
    """
    from peft_longlora import LongLoraConfig

    config = LongLoraConfig.from_pretrained(adapter)
    if not isinstance(config, LongLoraConfig):
        raise ValueError(
            f"--card is only for LongLoRA adapters; {adapter} has type {config.peft_type.value}. Leave --card out."
        )
    return config


def _write_card(config: LongLoraConfig, adapter: str, output: Path) -> str:
    """Copy the results and their plots into the adapter's folder, and write its card again.

    Returns: where the card is, and what an earlier card showed that this one does not.
    """
    from peft_longlora.hub import card, results

    rows, plots = _on_card(Path(adapter))
    results.copy_results(output, Path(adapter))
    said = f"Card: {card.write_card(config, adapter)}"
    left, kept = _on_card(Path(adapter))
    gone = [name for name in (*rows, *plots) if name not in (*left, *kept)]
    if gone:
        said += f"\nNo longer on the card, because this run did not measure it: {', '.join(gone)}."
    return said


def _on_card(folder: Path) -> tuple[list[str], list[str]]:
    """What an adapter's results measure, and the names of its plots; nothing if they cannot be read."""
    from peft_longlora.hub.results import read_results

    try:
        rows, plots = read_results(folder)
    except ValueError:
        return [], []
    named = (" ".join(map(str, filter(None, (r.task, r.protocol, r.dataset, r.length, r.variant)))) for r in rows)
    return list(dict.fromkeys(named)), plots


COMMAND = Command(
    "eval",
    "measure a model, with or without an adapter",
    add_options,
    run,
    description="Measure what a model's window is worth: perplexity, retrieval, question answering, cost. Writes "
    "results.json, a table and plots. If a run was stopped, the same command continues it.",
    epilog="Example: longlora eval --model meta-llama/Llama-2-7b-hf --adapter my-32k-adapter --tasks "
    "perplexity,native,passkey --data books/ --lengths 4k,8k,16k,32k --output out/. docs/evaluation.md explains "
    "the tasks and protocols.",
    interrupted="Stopped. The same command continues where this one ended.",
    options={"books": "data", "corpus": "data", "max_length": "lengths", "prompts": "longqa-prompts"},
)

"""`longlora eval`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from peft_longlora import LongLoraConfig
from peft_longlora.cli.arguments import refuse_file

INCOMPLETE = 3  # the exit code of an evaluation that lacks what ran out of memory


OWN_TASKS = ("perplexity", "native", "passkey", "needle", "ruler", "topics", "multidoc", "longqa", "cost")


def make_tasks(args: argparse.Namespace) -> list[Any]:
    """The tasks that were asked for.

    Raises: ValueError, ImportError: an unknown task, or data it needs is missing.
    """
    from peft_longlora import eval as suite
    from peft_longlora.eval.tasks import ruler

    def need(option: str) -> Any:
        value = getattr(args, option)
        if value is None:
            raise ValueError(f"Task {name!r} needs --{option}.")
        return value

    source = suite.Corpus(args.data, args.split, args.data_config, args.text_field) if args.data else None

    def corpus() -> suite.Corpus:
        need("data")
        return source

    cut = dict(stride=args.stride, buckets=args.buckets, max_windows=args.max_windows)
    lengths, tasks = sorted(set(args.lengths)), []
    books = suite.Books(source, lengths[-1]) if source else None
    for name in dict.fromkeys(part.strip() for part in args.tasks.split(",") if part.strip()):
        if name == "perplexity":
            for protocol in ("longlora", "documents") if args.protocol == "both" else (args.protocol,):
                tasks.append(suite.Perplexity(corpus(), lengths, protocol, **cut))
        elif name == "native":
            tasks.append(suite.Perplexity(corpus(), [], with_base=True, name="native", max_windows=args.max_windows))
        elif name in ("passkey", "needle"):
            if name == "needle":
                need("data")
            hay = books if name == "needle" else None
            tasks.append(
                suite.Passkey(
                    chat=args.chat, lengths=lengths, depths=args.depths, seeds=args.seeds, seed=args.seed, books=hay
                )
            )
        elif name == "ruler" or name.removeprefix("ruler_") in ruler.TASKS:
            for kind in ruler.TASKS if name == "ruler" else [name.removeprefix("ruler_")]:
                options = dict(samples=args.samples or 20, seed=args.seed, books=books)
                tasks.append(suite.Ruler(chat=args.chat, kind=kind, lengths=lengths, **options))
        elif name == "topics":
            tasks.append(suite.Topics(chat=args.chat, source=need("topics"), samples=args.samples))
        elif name == "multidoc":
            options = dict(samples=args.samples, places=args.places)
            tasks.append(suite.MultiDoc(chat=args.chat, source=need("multidoc"), **options))
        elif name == "longqa":
            options = dict(samples=args.samples, max_length=lengths[-1], prompts=args.longqa_prompts)
            tasks.append(suite.LongQA(chat=args.chat, source=need("longqa"), **options))
        elif name == "cost":
            tasks.append(suite.Cost(lengths))
        else:
            tasks.append(suite.Harness(name, args.limit, args.include_path, args.num_fewshot))
    if not tasks:
        raise ValueError(f"--tasks {args.tasks!r} names no task.")
    return tasks


def run_eval(args: argparse.Namespace) -> int:
    """`longlora eval`; returns the exit code."""
    from peft_longlora.eval import Perplexity, Processes, Settings, evaluate, load_subject

    if args.card and (args.adapter is None or not Path(args.adapter).is_dir()):
        raise ValueError(f"--card needs an adapter in a folder, not {args.adapter!r}.")
    tasks = make_tasks(args)
    refuse_file(args.output)
    for task in tasks:
        task.data()  # what cannot be read is said before a model is loaded
    processes = Processes.of_environment(args.device)
    subject = load_subject(
        args.model,
        args.adapter,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        device=processes.device,
        attention=args.attention,
        attn_implementation=args.attn_implementation,
        context_length=args.context_length,
        rope_type=args.rope_type,
    )
    config = LongLoraConfig.from_pretrained(args.adapter) if args.card else None
    if config is not None and not isinstance(config, LongLoraConfig):
        raise ValueError(f"--card is for LongLoRA's adapters; {args.adapter} is one of type {config.peft_type.value}.")
    for task in tasks:
        if isinstance(task, Perplexity) and task.name == "native":
            task.lengths = [subject.native_window]
    settings = Settings(seed=args.seed)
    results = evaluate(subject, tasks, args.output, settings=settings, overwrite=args.overwrite, processes=processes)
    if results is None:
        return 0
    from peft_longlora.eval.report.tables import make_report

    written = f"{args.output}: results.json, results.md, samples.jsonl and plots"
    if config is not None:
        written += f"\nCard: {write_card(config, args.adapter, args.output)}"
    print(make_report(results), written, sep="\n")
    if not results.unmeasured:
        return 0
    print(
        f"longlora eval: out of memory, left out of the results: {', '.join(results.unmeasured)}. All else is measured "
        f"and kept: with fewer --lengths the same command is complete, with more memory it goes on with these.",
        file=sys.stderr,
    )
    return INCOMPLETE


def write_card(config: LongLoraConfig, adapter: str, output: Path) -> Path:
    """Put results.json and the plots into the adapter's folder, and write its card anew."""
    import shutil

    from peft_longlora.hub import card

    for path in [output / "results.json", *output.glob("*.png")]:
        if path.resolve().parent != Path(adapter).resolve():
            shutil.copyfile(path, Path(adapter) / path.name)
    return card.write_card(config, adapter)

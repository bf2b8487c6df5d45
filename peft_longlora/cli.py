"""The console script `longlora`: `longlora eval`, `compare` and `chat`. Bad input ends with code 2 and one line."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from peft_longlora import LongLoraConfig, terminal
from peft_longlora.terminal import positive

BAD_INPUT = (ValueError, NotImplementedError, ImportError, OSError)
INCOMPLETE = 3  # the exit code of an evaluation that lacks what ran out of memory
OWN_TASKS = ("perplexity", "native", "passkey", "needle", "ruler", "topics", "multidoc", "longqa", "cost")


class Parser(argparse.ArgumentParser):
    """argparse with errors on one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end with code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _numbers(text: str) -> list[int]:
    parts = text.lower().split(",")
    try:
        numbers = [int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 4096,8192 or 4k,8k") from None
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number below 1")
    return numbers


def _percents(text: str) -> list[float]:
    try:
        numbers = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of percents such as 0,50,100") from None
    if not all(0 <= number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} holds a percentage outside 0 to 100")
    return numbers


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="longlora", description="Measure language models with long windows, and read with them.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "eval",
        help="measure a model, with or without an adapter",
        description="Measure what a model's window is worth: perplexity, retrieval, question answering, cost. Writes "
        "results.json, a table and plots; a run that was stopped goes on when the same command is given again.",
        epilog="Example: longlora eval --model meta-llama/Llama-2-7b-hf --adapter my-32k-adapter --tasks "
        "perplexity,native,passkey --data books/ --lengths 4k,8k,16k,32k --output out/. docs/evaluation.md explains "
        "the tasks and protocols.",
    )
    add = run.add_argument
    add("--model", required=True, help="folder or Hub id of the base")
    add("--adapter", help="folder or Hub id of a PEFT adapter")
    add("--tokenizer", help="folder or Hub id; the model's otherwise")
    add(
        "--tasks",
        default="perplexity,passkey",
        help=f"of {', '.join(OWN_TASKS)}; one RULER task such as ruler_vt; any task of lm-eval (default: %(default)s)",
    )
    add("--lengths", type=_numbers, default=[4096], help="tokens of windows and prompts, as 4096,8192 or 4k,8k (4k)")
    add("--output", required=True, type=Path, help="folder of results; one that holds the same run goes on")
    add("--overwrite", action="store_true", help="throw away what --output holds")
    add("--card", action="store_true", help="show the results in the adapter's card (README.md)")
    add("--seed", type=int, default=0, help="of generated prompts and of the intervals (%(default)s)")
    model = run.add_argument_group("model")
    model.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="auto: the file's (auto)"
    )
    model.add_argument("--device", help="cuda, cpu, ...; the GPU if there is one")
    model.add_argument(
        "--attention", default="dense", choices=["dense", "sparse"], help="sparse: the adapter's pattern (dense)"
    )
    model.add_argument("--attn-implementation", help="of dense attention: sdpa, flash_attention_2, ...")
    model.add_argument("--context-length", type=positive, help="rescale RoPE to so many tokens, without an adapter")
    model.add_argument("--rope-type", help="how --context-length rescales: yarn, ntk, linear, ... (yarn)")
    text = run.add_argument_group("documents (perplexity, native, needle, ruler)")
    text.add_argument(
        "--data", nargs="+", help=".txt, .jsonl, .json (each also .gz), folders of those, or a dataset's id"
    )
    text.add_argument("--split", default="train", help="of a dataset on the Hub (%(default)s)")
    text.add_argument("--data-config", help="of a dataset on the Hub")
    text.add_argument("--text-field", default="text", help="of records, where the document is (%(default)s)")
    text.add_argument(
        "--protocol", default="documents", choices=["documents", "longlora", "both"], help="of perplexity (documents)"
    )
    text.add_argument("--stride", type=_count, help="of windows; documents: half one, longlora: 256; 0: no overlap")
    text.add_argument("--buckets", type=_numbers, help="edges between positions; 512 and its doublings otherwise")
    text.add_argument("--max-windows", type=positive, help="the first so many of each document; all otherwise")
    prompts = run.add_argument_group("prompts")
    prompts.add_argument("--depths", type=_percents, default=[0, 0.25, 0.5, 0.75, 1], help="percents (0,25,50,75,100)")
    prompts.add_argument("--seeds", type=positive, default=2, help="keys for each length and depth (%(default)s)")
    prompts.add_argument("--samples", type=positive, help="prompts a ruler task and length (20), records a file (all)")
    prompts.add_argument("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    prompts.add_argument("--topics", help="LongChat's records")
    prompts.add_argument("--multidoc", help="lost-in-the-middle's records")
    prompts.add_argument(
        "--places",
        type=_percents,
        default=[0, 0.25, 0.5, 0.75, 1],
        help="of the gold passage, percents (0,25,50,75,100)",
    )
    prompts.add_argument("--longqa", help="LongAlpaca's or LongBench's records")
    prompts.add_argument("--longqa-prompts", help="LongBench's config/dataset2prompt.json")
    short = run.add_argument_group("lm-eval")
    short.add_argument("--limit", type=positive, help="the first so many questions of each task")
    short.add_argument("--include-path", help="a folder of task files")
    short.add_argument("--num-fewshot", type=_count, help="examples before a question; the task's own number otherwise")
    terminal.add_arguments(commands.add_parser("chat", help="ask questions of a long document"))
    pair = commands.add_parser(
        "compare",
        help="set two results.json side by side",
        description="Set two runs of longlora eval side by side, with differences and their intervals: as a table on "
        "the terminal and in compare.md, and as a plot in compare.png.",
    )
    pair.add_argument("first", help="results.json, or its folder")
    pair.add_argument("second", help="the same of the run that is set beside it")
    pair.add_argument("--labels", nargs=2, default=["first", "second"], help="names for the two (first second)")
    pair.add_argument("--output", type=Path, default=Path("compare"), help="folder of table and plot (%(default)s)")
    return parser


def make_tasks(args: argparse.Namespace) -> list[Any]:
    """The tasks that were asked for.

    Raises: ValueError, ImportError: an unknown task, or data it needs is missing.
    """
    from peft_longlora import eval as suite
    from peft_longlora.eval import ruler

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
    from peft_longlora.eval.report import make_report

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


def refuse_file(output: Path) -> None:
    """Refuse an --output that is a file, or lies in one, before there is anything to write.

    Raises: ValueError.
    """
    if found := next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None):
        raise ValueError(f"--output {output}: {found} is a file. Give a folder.")


def write_card(config: LongLoraConfig, adapter: str, output: Path) -> Path:
    """Put results.json and the plots into the adapter's folder, and write its card anew."""
    import shutil

    from peft_longlora import card

    for path in [output / "results.json", *output.glob("*.png")]:
        if path.resolve().parent != Path(adapter).resolve():
            shutil.copyfile(path, Path(adapter) / path.name)
    return card.write_card(config, adapter)


def run_compare(args: argparse.Namespace) -> None:
    """`longlora compare`."""
    from peft_longlora.eval import comparison as pairs

    refuse_file(args.output)
    differences, notes = pairs.compare(args.first, args.second)
    labels = tuple(args.labels)
    text = pairs.make_comparison(differences, notes, labels)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / pairs.REPORT).write_text(text, encoding="utf-8")
    pairs.plot_comparison(differences, labels).savefig(args.output / pairs.PLOT)
    print(text)
    print(f"{args.output}: {pairs.REPORT} and {pairs.PLOT}")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = make_parser().parse_args(argv)
    try:
        code = {"eval": run_eval, "compare": run_compare, "chat": terminal.run_chat}[args.command](args)
    except BrokenPipeError:  # `| head` has seen enough; without this Python complains when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (*BAD_INPUT, RuntimeError, MemoryError) as error:
        from peft_longlora.loading import is_out_of_memory

        reason = " ".join(str(error).split())
        if is_out_of_memory(error):
            reason = (
                f"The model does not fit into memory ({reason[:120]} ...). Try --dtype bfloat16, or another --device."
            )
        elif not isinstance(error, BAD_INPUT):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"longlora {args.command}: error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = " The same command goes on where this one ended." if args.command == "eval" else ""
        print(f"Stopped.{goes_on}", file=sys.stderr)
        return 130
    return code or 0


if __name__ == "__main__":
    sys.exit(main())

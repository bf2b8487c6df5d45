"""The console script `longlora`: `longlora eval`, `compare` and `chat`. Bad input ends with code 2 and one line."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from peft_longlora.cli import chat as terminal
from peft_longlora.cli.arguments import Parser, _count, _numbers, _percents, positive
from peft_longlora.cli.compare import run_compare
from peft_longlora.cli.evaluate import OWN_TASKS, run_eval

BAD_INPUT = (ValueError, NotImplementedError, ImportError, OSError)


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


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = make_parser().parse_args(argv)
    try:
        code = {"eval": run_eval, "compare": run_compare, "chat": terminal.run_chat}[args.command](args)
    except BrokenPipeError:  # `| head` has seen enough; without this Python complains when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (*BAD_INPUT, RuntimeError, MemoryError) as error:
        from peft_longlora.hub.loading import is_out_of_memory

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

"""Tokens a second and memory of one LoRA training step, and how much each means improves them.

One optimiser step (forward, backward, AdamW) of a real shape with random weights: LoRA r=16 on q, k, v, o, embeddings
and norms trained, batch 1, bf16 or 4 bits, S2-Attn with groups of 8192 tokens. Each of the first rows adds one means to
the row before. "full attention" is the last of these without S2-Attn; "liger, full" and "liger, full by PyTorch" are
"liger" without it, by the fastest kernel that is here or by PyTorch's choice. "by hand" takes --means. The others are
what a user would pick instead. Medians of --repeats steps after --warm-up steps.

    python benchmarks/training.py --shape llama-2-7b --lengths 32768 --output training.json
    python benchmarks/training.py --shape llama-3.1-8b --four-bit --limit-gib 24 --lengths 131072 --rows "memory filled"
    python benchmarks/training.py --shape llama-2-7b --lengths 8192 --rows "memory filled" float8 --losses 50
    python benchmarks/training.py --shape llama-2-7b --lengths 32768 --rows "liger, full by PyTorch" "liger, full" liger
    python benchmarks/training.py --lengths 32768 131072 --rows "by hand" --means '{"offload": 1, "tile_tokens": 4096}'

Hardware: one GPU with 80 GB. Liger's rows need `pip install liger-kernel`, 4 bits need bitsandbytes, the others TRL and
transformers 5.24; a row whose library is missing is left out and named. On a CPU: python benchmarks/training.py --tiny
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import training_others
from float8 import freeze_in_float8
from options import Parser, above_zero, count, new_file, positive
from shapes import SHAPES
from timed_steps import GIB, Progress, Timed, host_peak, profile, timed_steps
from training_model import make_model
from transformers import LlamaConfig

from peft_longlora.adapter.lowrank import HalfLowRank
from peft_longlora.memory import checkpoint_blocks, fit_memory
from peft_longlora.memory.estimate import Shape, Training, best_estimate, flops
from peft_longlora.memory.fit import own_loss
from peft_longlora.memory.host import host_budget
from peft_longlora.memory.plan import ESTIMATED_FILLED, MemoryPlan
from peft_longlora.rope.mixing import unmix

PEAK_TFLOPS = 989  # dense bf16 of an H100 or H200, by the datasheet
FULL = {"liger, full": "fastest", "liger, full by PyTorch": "sdpa"}  # the row "liger" with full attention, and whose
ROWS = (
    "float32 low rank",
    "half low rank",
    "attention kept",
    "liger",
    "memory filled",
    "full attention",
    "as planned",
    "by hand",
    *FULL,
    "float8",
    *training_others.NAMES,
)
WITHOUT_LIGER = ROWS[:3]
MAY_FAIL = ROWS[ROWS.index("float8") :]  # libraries in versions that nobody has tried together


def apply(
    row: str, model: torch.nn.Module, length: int, estimate: MemoryPlan, by_hand: dict
) -> tuple[dict, AbstractContextManager]:
    """Switch on what a row has; returns what is to be told of it, and what the forward runs in.

    Args:
        estimate: what `longlora plan` expects, without a GPU's measurements.
        by_hand: arguments of `checkpoint_blocks` for the row of this name.
    """
    if row in training_others.NAMES:
        return {}, training_others.apply(row, model)
    if row == "as planned":
        checkpoint_blocks(model, **estimate.options)
        return dict(
            expected_gib=estimate.peak / GIB, host_gib=estimate.host / GIB, options=estimate.options
        ), nullcontext()
    if row == "by hand":
        checkpoint_blocks(model, **by_hand)
        return dict(options=by_hand), nullcontext()
    if row == "float32 low rank":  # PEFT's own layers
        for layer in model.modules():
            if isinstance(layer, HalfLowRank):
                unmix(layer)
    if row == "float8":
        freeze_in_float8(model)
        free_memory(str(model.device.type))
    if row in ("memory filled", "full attention", "float8") and model.device.type == "cuda":
        plan = fit_memory(model, length)
        print(plan, flush=True)
        about = dict(expected_gib=plan.peak / GIB, host_gib=plan.host / GIB, options=plan.options)
        return about | dict(fixed_gib=plan.fixed / GIB, token_bytes=plan.token_bytes), nullcontext()
    checkpoint_blocks(model, keep=row in ("attention kept", "liger", *FULL))
    return {}, nullcontext()


def use_liger() -> None:
    """Liger's norm, RoPE, SwiGLU and fused loss, for every Llama that is made from now on."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, cross_entropy=False)


def run(row: str, args: argparse.Namespace, length: int, device: str, save: Callable[[dict], None]) -> dict:
    """One row of the table.

    Args:
        save: is given what is known of the row after each step, for a run that may be ended before the next one.
    """
    shape, progress = SHAPES[args.shape], Progress()
    progress.tell(f"{row}, {length} tokens: the model is made")
    torch.manual_seed(0)
    dense = "sdpa" if row == "full attention" else FULL.get(row)
    options = dict(four_bit=args.four_bit, embeddings=not args.no_embeddings, dense=dense)
    model = make_model(shape, length, args.group_size, device, **options)
    progress.tell("the model is there; now its plan")
    about, around = apply(row, model, length, expected(args, length), args.means)
    progress.watch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, fused=device == "cuda")
    ids = torch.randint(shape["vocab_size"], (1, length), device=device)
    losses = []

    def step() -> None:
        with around:
            loss = own_loss(model, ids)  # under autocast, as the Trainer's, if the embeddings are tied
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    work = flops(Shape.of(LlamaConfig(**shape)), length, length if dense else args.group_size)
    known = dict(row=row, length=length, **about)
    found: list[Timed] = []
    for one in timed_steps(step, device, args.warm_up, args.repeats, progress):
        found.append(one)
        result = known | summary(found, length, work)
        save(result | dict(unfinished=f"{len(found)} of {args.warm_up + args.repeats} steps"))
    while len(losses) < args.losses:
        step()
    result |= dict(host_peak_gib=host_peak(), losses=[round(loss.item(), 4) for loss in losses])
    print(
        f"{row:28s} {length:7d} tokens {result['seconds']:8.3f} s {result['tokens_per_second']:8.0f} tok/s "
        f"{result['peak_gib']:6.1f} GiB, {result['mfu']:.0%} of the peak rate {about or ''}",
        flush=True,
    )
    if args.profile and device == "cuda":
        result["profile"] = profile(step)[:40]
        for name, ms in result["profile"][:16]:
            print(f"    {ms:8.1f} ms  {name[:100]}", flush=True)
    return result


def summary(steps: list[Timed], length: int, work: float) -> dict:
    """What the steps that do not warm up took; while there is none, what the last one did."""
    timed = [one for one in steps if not one.warms_up] or steps[-1:]
    median = statistics.median(one.seconds for one in timed)
    found = dict(seconds=median, tokens_per_second=length / median, peak_gib=max(one.peak_gib for one in timed))
    first = [round(one.seconds, 3) for one in steps if one.warms_up]
    return found | dict(mfu=work / median / PEAK_TFLOPS / 1e12, warm_up_seconds=first)


def expected(args: argparse.Namespace, length: int) -> MemoryPlan:
    """The estimate of `longlora plan` for a GPU of this size, from the shape alone."""
    training = Training(embeddings=not args.no_embeddings, four_bit=args.four_bit)
    size = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 80 * GIB
    budget = int(ESTIMATED_FILLED * min(size, (args.limit_gib or 1000) * GIB))
    return best_estimate(Shape.of(LlamaConfig(**SHAPES[args.shape])), training, length, budget, host_budget())


def means(text: str) -> dict:
    """Arguments of `checkpoint_blocks`, as JSON."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    known = inspect.signature(checkpoint_blocks).parameters.keys() - {"model"}
    if not isinstance(found, dict) or not found.keys() <= known:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON with arguments of checkpoint_blocks, {sorted(known)}")
    return found


def free_memory(device: str) -> None:
    """What a PEFT model, which refers to itself, has left behind."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def versions() -> dict:
    """Of everything that a number depends on."""
    found = {}
    names = ("torch", "transformers", "peft", "peft-longlora", "liger-kernel", "flash-attn-4", "bitsandbytes", "trl")
    for package in names:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-2-7b")
    add("--lengths", type=positive, nargs="+", default=[32768])
    add("--group-size", type=positive, default=8192)
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS[:5]))
    add("--four-bit", action="store_true", help="a base in NF4")
    add("--no-embeddings", action="store_true", help="train LoRA and norms alone")
    add("--limit-gib", type=above_zero, help="memory that this process may use, as if the GPU had no more")
    add("--means", type=means, default={}, help='of the row "by hand": arguments of checkpoint_blocks, as JSON')
    add("--losses", type=count, default=0, help="steps whose losses are written (default: those that are timed)")
    add("--repeats", type=positive, default=3)
    add("--warm-up", type=count, default=2, help="steps before those that are timed (%(default)s)")
    add("--profile", action="store_true", help="print where the time goes, kernel by kernel")
    add("--tiny", action="store_true", help="a toy shape on the CPU, to see that it runs")
    add("--output", type=new_file, help="write the numbers here as JSON, after every row")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.lengths, args.group_size = "tiny", [256], 64
    device = "cpu" if args.tiny or not torch.cuda.is_available() else "cuda"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    settings = {name: getattr(args, name) for name in ("shape", "group_size", "four_bit", "no_embeddings", "limit_gib")}
    about = dict(device=name, **settings, **versions(), command="python " + shlex.join(sys.argv))
    print(about, flush=True)
    if device == "cuda" and args.limit_gib:
        torch.cuda.set_per_process_memory_fraction(args.limit_gib * GIB / torch.cuda.mem_get_info()[1])
    results, is_liger = [], False

    def save(*unfinished: dict) -> None:
        if args.output:
            Path(args.output).write_text(json.dumps(dict(about=about, results=[*results, *unfinished]), indent=2))

    for length in args.lengths:
        for row in args.rows:
            try:
                if row not in WITHOUT_LIGER and not is_liger and device == "cuda":
                    use_liger()
                    is_liger = True
                results.append(run(row, args, length, device, save))
            except ImportError as error:
                print(f"{row}: left out ({error})", flush=True)
                results.append(dict(row=row, length=length, seconds=None, missing=str(error)))
            except Exception as error:  # the other rows are worth having
                if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and row not in MAY_FAIL:
                    raise
                print(f"{row:28s} {length:7d} tokens: {type(error).__name__}. {error}", flush=True)
                results.append(dict(row=row, length=length, seconds=None, error=str(error)[:500]))
            free_memory(device)
            save()


if __name__ == "__main__":
    main()

"""Tokens a second and memory of one LoRA training step, and how much each means improves them.

One optimiser step (forward, backward, AdamW) of a real shape with random weights: LoRA r=16 on q, k, v, o, embeddings
and norms trained, batch 1, bf16 or 4 bits, S2-Attn with groups of 8192 tokens. Each of the first rows adds one means to
the row before. "full attention" is the last of these without S2-Attn. The others are what a user would pick instead.
Medians of --repeats steps after --warm-up steps.

    python benchmarks/training.py --shape llama-2-7b --lengths 32768 --output training.json
    python benchmarks/training.py --shape llama-3.1-8b --four-bit --limit-gib 24 --lengths 131072 --rows "memory filled"
    python benchmarks/training.py --shape llama-2-7b --lengths 8192 --rows "memory filled" float8 --losses 50

Hardware: one GPU with 80 GB. Liger's rows need `pip install liger-kernel`, 4 bits need bitsandbytes, the others TRL and
transformers 5.24; a row whose library is missing is left out and named. On a CPU: python benchmarks/training.py --tiny
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import training_others
from float8 import freeze_in_float8
from options import Parser, above_zero, count, new_file, positive
from shapes import SHAPES
from training_model import make_model
from transformers import LlamaConfig

from peft_longlora.adapter.lowrank import HalfLowRank
from peft_longlora.memory import checkpoint_blocks, fit_memory
from peft_longlora.memory.estimate import Shape, Training, best_estimate, flops
from peft_longlora.memory.plan import ESTIMATED_FILLED, MemoryPlan, host_budget
from peft_longlora.rope.mixing import unmix

PEAK_TFLOPS = 989  # dense bf16 of an H100 or H200, by the datasheet
GIB = 2**30
ROWS = (
    "float32 low rank",
    "half low rank",
    "attention kept",
    "liger",
    "memory filled",
    "full attention",
    "as planned",
    "float8",
    *training_others.NAMES,
)
WITHOUT_LIGER = ROWS[:3]
MAY_FAIL = ROWS[7:]  # libraries in versions that nobody has tried together


def apply(row: str, model: torch.nn.Module, length: int, estimate: MemoryPlan) -> tuple[dict, AbstractContextManager]:
    """Switch on what a row has; returns what is to be told of it, and what the forward runs in.

    Args:
        estimate: what `longlora plan` expects, without a GPU's measurements.
    """
    if row in training_others.NAMES:
        return {}, training_others.apply(row, model)
    if row == "as planned":
        checkpoint_blocks(model, **estimate.options)
        return dict(
            expected_gib=estimate.peak / GIB, host_gib=estimate.host / GIB, options=estimate.options
        ), nullcontext()
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
    checkpoint_blocks(model, keep=row in ("attention kept", "liger"))
    return {}, nullcontext()


def use_liger() -> None:
    """Liger's norm, RoPE, SwiGLU and fused loss, for every Llama that is made from now on."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, cross_entropy=False)


def measure(step: Callable[[], None], device: str, warm_up: int, repeats: int) -> tuple[list[float], float]:
    """Seconds of each step, and GiB at the peak."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(warm_up):
        step()
    synchronize()
    if device == "cuda":  # what made the model, and measured it, does not count
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds, torch.cuda.max_memory_allocated() / GIB if device == "cuda" else float("nan")


def profile(step: Callable[[], None]) -> list[tuple[str, float]]:
    """Milliseconds of each kernel of one step, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    found = [(event.key, event.device_time_total / 1e3) for event in seen.key_averages()]
    return sorted(found, key=lambda pair: -pair[1])


def run(row: str, args: argparse.Namespace, length: int, device: str) -> dict:
    """One row of the table."""
    shape = SHAPES[args.shape]
    torch.manual_seed(0)
    options = dict(four_bit=args.four_bit, embeddings=not args.no_embeddings, dense=row == "full attention")
    model = make_model(shape, length, args.group_size, device, **options)
    about, around = apply(row, model, length, expected(args, length))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, fused=device == "cuda")
    ids = torch.randint(shape["vocab_size"], (1, length), device=device)
    losses = []

    def step() -> None:
        with around:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    seconds, peak = measure(step, device, args.warm_up, args.repeats)
    median = statistics.median(seconds)
    mfu = flops(Shape.of(LlamaConfig(**shape)), length, args.group_size) / median / PEAK_TFLOPS / 1e12
    result = dict(row=row, length=length, seconds=median, tokens_per_second=length / median, peak_gib=peak, mfu=mfu)
    while len(losses) < args.losses:
        step()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result |= about | dict(host_peak_gib=host, losses=[round(loss.item(), 4) for loss in losses])
    print(
        f"{row:28s} {length:7d} tokens {median:8.3f} s {length / median:8.0f} tok/s {peak:6.1f} GiB, {mfu:.0%} of the "
        f"peak rate {about or ''}",
        flush=True,
    )
    if args.profile and device == "cuda":
        result["profile"] = profile(step)[:40]
        for name, ms in result["profile"][:16]:
            print(f"    {ms:8.1f} ms  {name[:100]}", flush=True)
    return result


def expected(args: argparse.Namespace, length: int) -> MemoryPlan:
    """The estimate of `longlora plan` for a GPU of this size, from the shape alone."""
    training = Training(embeddings=not args.no_embeddings, four_bit=args.four_bit)
    size = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 80 * GIB
    budget = int(ESTIMATED_FILLED * min(size, (args.limit_gib or 1000) * GIB))
    return best_estimate(Shape.of(LlamaConfig(**SHAPES[args.shape])), training, length, budget, host_budget())


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
    about = dict(device=name, **settings, **versions(), command="python " + " ".join(sys.argv))
    print(about, flush=True)
    if device == "cuda" and args.limit_gib:
        torch.cuda.set_per_process_memory_fraction(args.limit_gib * GIB / torch.cuda.mem_get_info()[1])
    results, is_liger = [], False
    for length in args.lengths:
        for row in args.rows:
            try:
                if row not in WITHOUT_LIGER and not is_liger and device == "cuda":
                    use_liger()
                    is_liger = True
                results.append(run(row, args, length, device))
            except ImportError as error:
                print(f"{row}: left out ({error})", flush=True)
                results.append(dict(row=row, length=length, seconds=None, missing=str(error)))
            except Exception as error:  # the other rows are worth having
                if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and row not in MAY_FAIL:
                    raise
                print(f"{row:28s} {length:7d} tokens: {type(error).__name__}. {error}", flush=True)
                results.append(dict(row=row, length=length, seconds=None, error=str(error)[:500]))
            free_memory(device)
            if args.output:
                Path(args.output).write_text(json.dumps(dict(about=about, results=results), indent=2))


if __name__ == "__main__":
    main()

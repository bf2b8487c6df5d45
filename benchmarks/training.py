"""Tokens a second and memory of one LoRA training step, and how much each means improves them.

One optimiser step (forward, backward, AdamW) of a real shape with random weights: LoRA r=16 on q, k, v, o, embeddings
and norms trained, batch 1, bf16, S2-Attn with groups of 8192 tokens. Each row of the table adds one means to the row
before. Medians of --repeats steps after --warm-up steps.

    python benchmarks/training.py --shape llama-2-7b --lengths 32768 --output training.json

Hardware: one GPU with 80 GB. Liger's rows need `pip install liger-kernel`, and are left out without it. On a CPU:
    python benchmarks/training.py --tiny
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from peft import get_peft_model
from shapes import LLAMA_2_7B, LLAMA_3_8B, TINY
from transformers import LlamaConfig, LlamaForCausalLM

from peft_longlora import LongLoraConfig
from peft_longlora.adapter.lowrank import HalfLowRank
from peft_longlora.memory import checkpoint_blocks, fit_memory

SHAPES = {"llama-2-7b": LLAMA_2_7B, "llama-3.1-8b": LLAMA_3_8B, "tiny": TINY}
PEAK_TFLOPS = 989  # dense bf16 of an H100 or H200, by the datasheet
ROWS = (
    "float32 low rank",
    "half low rank",
    "attention kept",
    "liger",
    "memory filled",
    "offloaded",
    "offloaded, tiled",
    "half offloaded, tiled",
)
WITH_LIGER = ROWS[3:]


def make_model(shape: dict, length: int, group_size: int, device: str) -> torch.nn.Module:
    """A PEFT model of `shape` with random weights, ready to train at `length`."""
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    window = max(length, 2 * shape["max_position_embeddings"])
    config = LongLoraConfig(r=16, lora_alpha=32, context_length=window, rope_type="linear", group_size=group_size)
    model = get_peft_model(model, config)
    model.config.use_cache = False
    return model.train()


def apply(row: str, model: torch.nn.Module, length: int) -> dict:
    """Switch on what a row has; returns what is to be told of it."""
    if row == "float32 low rank":  # PEFT's own layers
        for layer in model.modules():
            if isinstance(layer, HalfLowRank):
                layer.__class__ = layer.original_class
    if row == "memory filled" and length >= 4096:
        plan = fit_memory(model, length)
        print(plan, flush=True)
        return dict(free_blocks=plan.free, expected_gib=plan.peak / 2**30, means=plan.means)
    offload = 2 if row.startswith("half offloaded") else row.startswith("offloaded")
    tile = 16384 if row.endswith("tiled") else None
    keep = row in ("attention kept", "liger", "memory filled")
    checkpoint_blocks(model, keep=keep, offload=offload, tile_tokens=tile)
    return {}


def use_liger() -> None:
    """Liger's norm, RoPE, SwiGLU and fused loss, for every Llama that is made from now on."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, cross_entropy=False)


def flops(shape: dict, length: int, group_size: int) -> float:
    """Of a step without any second forward: frozen products forward and to their input, attention of S2's groups."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner) + hidden * shape["vocab_size"]
    pairs = length * min(group_size, length) / 2
    return 4 * weights * length + layers * 3.5 * 4 * pairs * hidden


def measure(step: Callable[[], None], device: str, warm_up: int, repeats: int) -> tuple[list[float], float]:
    """Seconds of each step, and GiB at the peak."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(warm_up):
        step()
    synchronize()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")


def profile(step: Callable[[], None]) -> list[tuple[str, float]]:
    """Milliseconds of each kernel of one step, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    found = [(event.key, event.device_time_total / 1e3) for event in seen.key_averages()]
    return sorted(found, key=lambda pair: -pair[1])


def run(row: str, model: torch.nn.Module, shape: dict, args: argparse.Namespace, length: int, device: str) -> dict:
    """One row of the table."""
    about = apply(row, model, length)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, fused=device == "cuda")
    ids = torch.randint(shape["vocab_size"], (1, length), device=device)
    losses = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    seconds, peak = measure(step, device, args.warm_up, args.repeats)
    median = statistics.median(seconds)
    mfu = flops(shape, length, args.group_size) / median / PEAK_TFLOPS / 1e12
    result = dict(row=row, length=length, seconds=median, tokens_per_second=length / median, peak_gib=peak, mfu=mfu)
    result |= about | dict(losses=[round(loss.item(), 4) for loss in losses])
    print(
        f"{row:18s} {length:7d} tokens {median:8.3f} s {length / median:8.0f} tok/s {peak:6.1f} GiB, {mfu:.0%} of the "
        f"peak rate {about or ''}",
        flush=True,
    )
    if args.profile and device == "cuda":
        result["profile"] = profile(step)[:40]
        for name, ms in result["profile"][:16]:
            print(f"    {ms:8.1f} ms  {name[:100]}", flush=True)
    return result


def free_memory(device: str) -> None:
    """What a PEFT model, which refers to itself, has left behind."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def versions() -> dict:
    """Of everything that a number depends on."""
    found = {}
    for package in ("torch", "transformers", "peft", "peft-longlora", "liger-kernel", "flash-attn-4"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768])
    parser.add_argument("--group-size", type=int, default=8192)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS[:5]))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those that are timed (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, kernel by kernel")
    parser.add_argument("--tiny", action="store_true", help="a toy shape on the CPU, to see that it runs")
    parser.add_argument("--output", help="write the numbers here as JSON, after every row")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.lengths, args.group_size = "tiny", [256], 64
    device = "cpu" if args.tiny or not torch.cuda.is_available() else "cuda"
    shape = SHAPES[args.shape]
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    about = dict(device=name, shape=args.shape, group_size=args.group_size, **versions())
    about["command"] = "python " + " ".join(sys.argv)
    print(about, flush=True)
    results, is_liger = [], False
    for length in args.lengths:
        for row in args.rows:
            if row in WITH_LIGER and not is_liger and device == "cuda":
                try:
                    use_liger()
                    is_liger = True
                except ImportError as error:
                    print(f"{row}: without Liger ({error})", flush=True)
                    if row != "memory filled":
                        continue
            try:
                results.append(
                    run(row, make_model(shape, length, args.group_size, device), shape, args, length, device)
                )
            except (torch.OutOfMemoryError, MemoryError) as error:
                print(f"{row:18s} {length:7d} tokens: out of memory. {error}", flush=True)
                results.append(dict(row=row, length=length, seconds=None))
            free_memory(device)
            if args.output:
                Path(args.output).write_text(json.dumps(dict(about=about, results=results), indent=2))


if __name__ == "__main__":
    main()

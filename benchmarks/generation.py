"""Memory and speed of reading a long document and answering: one row for each KV cache and length.

A model of Llama-3.2-1B's shape with random weights in bf16 and a LongLoRA adapter on it. A row of random tokens is read
in chunks, as `longlora chat` does ("whole": in one forward, into a dense cache), then answered greedily, token by
token; nothing is compiled. "hqq" and "quanto" are the quantised cache, 4 bits; quanto compiles kernels first (nvcc).

    python benchmarks/generation.py --lengths 8k,32k,128k --output generation.json

Hardware: a GPU with 24 GB or more; docs/serving.md has one H200's table. On a CPU:
    python benchmarks/generation.py --tiny
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import time
from typing import Any

import peft
import torch
import transformers
from options import Parser, above_zero, new_file, numbers, positive
from peft import get_peft_model
from shapes import SHAPES
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation.streamers import BaseStreamer

from peft_longlora import LongLoraConfig
from peft_longlora.chat.kvcache import QUANTISERS, KVCache

LLAMA_3_2_1B = SHAPES["llama-3.2-1b"] | dict(rope_parameters=dict(rope_type="default", rope_theta=500000.0))
TINY = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
)
CACHES = ("dense", "whole", "static", "offloaded", *QUANTISERS)


class Clock(BaseStreamer):
    """When each token came; the first entry is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def make_model(shape: dict[str, Any], context_length: int, device: str) -> torch.nn.Module:
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    config = LongLoraConfig(r=16, context_length=context_length, train_embeddings=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def make_cache(model: torch.nn.Module, cache: str, length: int, chunk: int) -> KVCache:
    """Raises: ValueError, ImportError: a cache that does not work here."""
    if cache in QUANTISERS:
        return KVCache(model, "quantised", chunk, backend=cache)
    kv = KVCache(model, "offloaded" if cache == "offloaded" else "dense", chunk)
    if cache == "static":
        kv.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
    return kv


def measure(model: torch.nn.Module, cache: str, length: int, new_tokens: int, chunk: int) -> dict[str, Any]:
    """One row: seconds, tokens a second and bytes."""
    chunk = length if cache == "whole" else chunk
    is_gpu, row = model.device.type == "cuda", {"cache": cache, "length": length, "chunk": chunk}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()
    gc.collect()
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        row["weights_bytes"] = torch.cuda.memory_allocated()
    try:
        kv = make_cache(model, cache, length + new_tokens, chunk)
        start = time.perf_counter()
        kv.fill(ids[:-1])
        if is_gpu:
            torch.cuda.synchronize()
        row["prefill_seconds"] = time.perf_counter() - start
        row["prefill_peak_bytes"] = torch.cuda.max_memory_allocated() if is_gpu else None
        inputs, clock = torch.tensor([ids], device=model.device), Clock()
        model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            **kv.as_argument,
            streamer=clock,
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, disable_compile=True
            ),
        )
        row["first_token_seconds"] = clock.times[1] - start
        row["tokens_per_second"] = (new_tokens - 1) / (clock.times[-1] - clock.times[1])
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if is_gpu else None
        row["kv_bytes"] = kv.nbytes()
    except (ValueError, ImportError, RuntimeError) as error:  # not here, or out of memory
        row["error"] = " ".join(str(error).split())[:200]
    return row


def show(row: dict[str, Any]) -> str:
    """A line of the table."""

    def number(key: str, form: str, scale: float = 1) -> str:
        return format(row[key] / scale, form) if row.get(key) is not None else "-"

    cells = [
        f"{row['length']:,}",
        row["cache"],
        number("prefill_seconds", ".2f"),
        number("first_token_seconds", ".2f"),
        number("tokens_per_second", ".1f"),
        number("kv_bytes", ",.2f", 2**30),
        number("peak_bytes", ",.2f", 2**30),
    ]
    return (
        f"| {' | '.join(cells)} |" if "error" not in row else f"| {cells[0]} | {cells[1]} | {row['error']} |" + " |" * 4
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--lengths", type=numbers, default=numbers("8k,32k,128k"), help="tokens: 8k,32k,128k")
    parser.add_argument("--caches", nargs="+", default=CACHES[:-1], choices=CACHES)
    parser.add_argument("--new-tokens", type=positive, default=17, help="the first one, and those that are timed")
    parser.add_argument("--chunk", type=positive, default=4096, help="tokens of one forward in prefill")
    parser.add_argument("--limit", type=above_zero, default=1e9, help="seconds after which no row is begun")
    parser.add_argument("--tiny", action="store_true", help="a model and lengths for a CPU")
    parser.add_argument("--output", type=new_file, help="results as JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths, chunk = ([200, 600], 64) if args.tiny else (args.lengths, args.chunk)
    begin = time.perf_counter()
    torch.manual_seed(0)
    model = make_model(TINY if args.tiny else LLAMA_3_2_1B, max(lengths) + args.new_tokens, device)
    packages = ("optimum-quanto", "hqq")
    versions = {name: _version(name) for name in packages}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        "versions": versions,
        "shape": TINY if args.tiny else LLAMA_3_2_1B,
        "rows": [],
    }
    print(f"{result['device']}, {versions}")
    print("| tokens | cache | prefill, s | to the first token, s | tokens/s | KV, GiB | peak, GiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for cache in args.caches:
        measure(model, cache, min(2 * chunk, lengths[0]), 3, chunk)  # kernels are chosen and compiled outside the clock
    for length in lengths:
        for cache in args.caches:
            if time.perf_counter() - begin > args.limit:
                print(f"{cache} at {length}: not run, --limit {args.limit:g} seconds are over")
                continue
            row = measure(model, cache, length, args.new_tokens, chunk)
            print(show(row), flush=True)
            result["rows"].append(row)
            if args.output:
                with open(args.output, "w") as file:
                    json.dump(result, file, indent=1)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

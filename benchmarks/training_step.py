"""Time and memory of one LoRA training step: what S2-Attn saves, and what it does not.

One optimiser step (forward, backward with gradient checkpointing, AdamW) of a Llama-2-7B shape with random weights,
LoRA r=8 on q, k, v, o, embeddings and norms trained, batch 1, bf16, group size a quarter of the row. Every row of the
table is the same model and the same call; only the attention differs. Medians of --repeats steps after one warm-up.

    python benchmarks/training_step.py --lengths 32768 65536 --output step.json

Hardware: one GPU with 80 GB or more for 32768 tokens (measured on one H200: about 2 minutes). On a CPU:
    python benchmarks/training_step.py --tiny
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import time
from contextlib import nullcontext

import peft
import torch
import transformers
from options import Parser, new_file, positive
from peft import get_peft_model
from shapes import LLAMA_2_7B, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from peft_longlora import LongLoraConfig

ATTENTIONS = ("full", "full, cudnn", "s2")


def make_model(shape: dict, context_length: int, attention: str, device: str) -> torch.nn.Module:
    """A PEFT model of `shape` with random weights, ready to train at `context_length`."""
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    config = LongLoraConfig(
        r=8,
        lora_alpha=16,
        context_length=context_length,
        rope_type="linear",
        attention_pattern="s2" if attention == "s2" else "full",
    )
    model = get_peft_model(model, config)
    if attention.startswith("full"):  # what the model would run without S2-Attn: PyTorch's own choice, or cuDNN
        model.get_base_model().set_attn_implementation("sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return model.train()


def measure(shape: dict, length: int, attention: str, device: str, repeats: int) -> dict:
    """Median seconds and peak memory of one step."""
    model = make_model(shape, length, attention, device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-5)
    tokens = torch.randint(shape["vocab_size"], (1, length), device=device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if attention == "full, cudnn" else nullcontext():
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    result = dict(attention=attention, length=length, seconds=median, tokens_per_second=length / median, peak_gib=peak)
    print(
        f"{attention:12s} {length:7d} tokens {median:8.2f} s {length / median:9.0f} tok/s {peak:6.1f} GiB", flush=True
    )
    del model, optimizer, loss
    gc.collect()  # a PEFT model refers to itself: without this the next row would count it
    if device == "cuda":
        torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[32768])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--repeats", type=positive, default=2)
    parser.add_argument("--layers", type=positive, help="fewer layers than 32, to try it out")
    parser.add_argument("--tiny", action="store_true", help="a toy shape on the CPU, to see that it runs")
    parser.add_argument("--output", type=new_file, help="write the numbers here as JSON")
    args = parser.parse_args()
    device = "cpu" if args.tiny or not torch.cuda.is_available() else "cuda"
    shape = TINY if args.tiny else LLAMA_2_7B
    if args.layers:
        shape = {**shape, "num_hidden_layers": args.layers}
    attentions = [a for a in args.attention if device == "cuda" or a != "full, cudnn"]
    about = dict(
        device=torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
        shape=shape,
        command="python " + " ".join(sys.argv),
    )
    print(about, flush=True)
    lengths = [256] if args.tiny else args.lengths
    results = []
    for length in lengths:
        for attention in attentions:
            try:
                results.append(measure(shape, length, attention, device, args.repeats))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                print(f"{attention:12s} {length:7d} tokens: out of memory", flush=True)
                results.append(dict(attention=attention, length=length, seconds=None))
    if args.output:
        with open(args.output, "w") as file:
            json.dump(dict(about=about, results=results), file, indent=2)


if __name__ == "__main__":
    main()

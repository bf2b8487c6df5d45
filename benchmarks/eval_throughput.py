"""Throughput and memory of perplexity by `longlora eval` against a bare forward loop over the same windows.

The bare loop is the simplest code: it calls `model(input_ids)` for one window after the other, makes all logits and
throws them away; there is no loss and no result. Its windows are ready as tokens. The suite reads the files, makes
tokens, scores every token and writes its journal; its time begins when the first window is ready.

    python benchmarks/eval_throughput.py --model SmolLM2-135M --data books/ --lengths 8192 32768

`--random-weights` needs only the model's config and tokenizer: time and memory do not depend on the weights.
Hardware: any; half a minute on one H200. On a CPU:
    python benchmarks/eval_throughput.py --model examples/assets/stdlib-llama-512 --data books/ --lengths 512
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
import transformers
from options import Parser, positive
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_longlora.eval import Corpus, Perplexity, evaluate, load_subject
from peft_longlora.eval.subject import Subject


def make_subject(args: argparse.Namespace, device: str) -> Subject:
    """The model as saved, or of its shape."""
    if not args.random_weights:
        return load_subject(args.model, dtype="bfloat16", device=device)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=torch.bfloat16)
    return Subject.of(model.to(device).eval(), AutoTokenizer.from_pretrained(args.model))


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_gib(device: str) -> float:
    """Of the GPU's allocator since the last call, GiB."""
    if device != "cuda":
        return float("nan")
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


@torch.no_grad()
def run_bare(subject: Subject, windows: list[torch.Tensor], device: str) -> float:
    """Seconds of a plain loop over the windows."""
    synchronize(device)
    start = time.perf_counter()
    for ids in windows:
        logits = subject.model(input_ids=ids[None].to(device), use_cache=False).logits
        del logits
        synchronize(device)
    return time.perf_counter() - start


def run_suite(subject: Subject, corpus: Corpus, length: int) -> float:
    """Seconds that `longlora eval` says the windows took."""
    with tempfile.TemporaryDirectory() as folder:
        task = Perplexity(corpus, [length], "documents", stride=0)
        results = evaluate(subject, [task], folder, show_progress=False)
    if results.unmeasured:
        raise MemoryError(f"{results.unmeasured[0]}: out of memory")
    return results.speed[f"perplexity {length}"]["seconds"]


def main() -> None:
    """Print one row a length."""
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--lengths", nargs="+", type=positive, default=[8192, 32768])
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--random-weights", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with parser.refusing():
        corpus = Corpus(args.data)
        corpus.summary()
        subject = make_subject(args, device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}, {versions}, bfloat16, medians of {args.repeats}")
    print("| window | windows | tokens | bare loop, tokens/s | longlora eval, tokens/s | ratio | GiB bare | GiB eval |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for length in args.lengths:
        windows = [window.inputs for window in corpus.document_windows(subject.encode_all, length, length)]
        tokens = sum(len(ids) for ids in windows)
        run_bare(subject, windows[:2], device)
        run_suite(subject, corpus, length)
        peak_gib(device)
        bare, suite, memory = [], [], [0.0, 0.0]
        for _ in range(args.repeats):  # in turns, so that a slow minute of the machine hits both
            bare.append(run_bare(subject, windows, device))
            memory[0] = peak_gib(device)
            suite.append(run_suite(subject, corpus, length))
            memory[1] = peak_gib(device)
        slow, fast = statistics.median(suite), statistics.median(bare)
        print(
            f"| {length} | {len(windows)} | {tokens} | {tokens / fast:.0f} | {tokens / slow:.0f} | {fast / slow:.3f} "
            f"| {memory[0]:.2f} | {memory[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

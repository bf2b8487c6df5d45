"""Memory while a corpus is read, tokenised and cut into windows as `longlora eval --tasks perplexity` does it.

Each size runs completely in a separate process, which prints its resident memory along the way. The corpora differ only
in size: every 16 MB hold four documents each of 4 KB, 8 KB, ... 2 MB, in any order, of invented words
(word n as often as 1/n). The model is loaded, but its forward is left out: it would take weeks on a CPU, and its
memory depends only on the window.

    python benchmarks/eval_memory.py --megabytes 16 64 256 1024

Linux; a minute for 100 MB and protocol on two cores. `--data` measures an existing corpus.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from options import Parser, positive

MODEL = Path(__file__).parents[1] / "examples" / "assets" / "stdlib-llama-512"
PARTS = (0.1, 0.25, 0.5, 0.75)  # and at the end
BLOCK = 16  # MB
PROTOCOLS = ("documents", "longlora")
SIZES = [2**power for power in range(12, 22)] * 4  # bytes: 4 KB to 2 MB


def write_corpus(folder: Path, megabytes: int, seed: int = 0) -> None:
    """A .jsonl for each 16 MB."""
    rng = np.random.default_rng(seed)
    syllables = [a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r")]
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(50_000)])
    chances = np.cumsum(1 / np.arange(1, len(words) + 1))
    for block in range(megabytes // BLOCK):
        with (folder / f"{block:04d}.jsonl").open("w") as file:
            for size in rng.permutation(SIZES):
                picks = np.searchsorted(chances, rng.random(size // 4) * chances[-1])
                file.write(json.dumps({"text": " ".join(words[picks])[:size]}) + "\n")


def resident() -> float:
    """MiB of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(data: str, protocol: str, length: int, model: str) -> dict[str, object]:
    """Pass over the windows of a corpus, as the evaluation does."""
    from peft_longlora.data.prefetch import prefetch
    from peft_longlora.eval import Corpus, load_subject

    subject, corpus = load_subject(model), Corpus(data)
    loaded = resident()
    summary = corpus.summary()
    cut = corpus.stream_windows if protocol == "longlora" else corpus.document_windows
    stride = 256 if protocol == "longlora" else length // 2
    parts, along, windows, tokens, start = list(PARTS), [], 0, 0, time.perf_counter()
    for window in prefetch(cut(subject.encode_all, length, stride)):
        windows += 1
        tokens += len(window.targets) - window.first if protocol == "documents" else stride
        while parts and window.progress >= parts[0]:
            along.append(resident())
            parts.pop(0)
    along.append(resident())
    return {
        "documents": summary.documents,
        "megabytes": summary.characters / 2**20,
        "windows": windows,
        "speed": tokens / (time.perf_counter() - start),
        "memory": [loaded, *along, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10],
    }


def main() -> None:
    """Print one row a corpus and protocol; a process of its own for each."""
    parser = Parser(__doc__)
    parser.add_argument("--megabytes", nargs="+", type=positive, default=[16, 64, 256, 1024], help="multiples of 16")
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--length", type=positive, default=512)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--data", help="files instead of invented words")
    parser.add_argument("--one", action="store_true", help="measure --data in this process and print it as JSON")
    args = parser.parse_args()
    if args.one and not args.data:
        parser.error("--one measures --data. Give files or a folder")
    if args.one:
        with parser.refusing():
            print(json.dumps(measure(args.data, args.protocols[0], args.length, args.model)))
        return
    import torch
    import transformers

    from peft_longlora.eval import Corpus

    with parser.refusing():
        transformers.AutoConfig.from_pretrained(args.model)
        if args.data:
            Corpus(args.data).summary()

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; windows of {args.length} tokens; resident memory, MiB"
    )
    shown = " | ".join(f"{part:.0%}" for part in (*PARTS, 1))
    print(f"| corpus, MB | documents | protocol | windows | tokens/s | model loaded | {shown} | peak |")
    print("| --- " * (8 + len(PARTS)) + "|", flush=True)
    for megabytes in [0] if args.data else args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            if not args.data:
                write_corpus(Path(folder), megabytes)
            for protocol in args.protocols:
                options = ["--one", "--data", args.data or folder, "--length", str(args.length), "--model", args.model]
                command = [sys.executable, __file__, *options, "--protocols", protocol]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                memory = " | ".join(f"{x:.0f}" for x in found["memory"])
                print(
                    f"| {found['megabytes']:.0f} | {found['documents']} | {protocol} | {found['windows']} "
                    f"| {found['speed']:,.0f} | {memory} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

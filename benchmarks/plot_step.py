"""Where the time of a training step goes: a bar for each row of benchmarks/training.py, cut by kind of kernel.

    python benchmarks/plot_step.py benchmarks/results/training_32k_h100.json docs/images/training_step.png

Times of kernels are added up, so bars of steps whose attention runs on several streams are longer than the step.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
from options import Parser, new_file, old_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The first pattern that a kernel's name holds says what it is.
KINDS = {
    "matrix products": r"nvjet|gemm|xmma|splitK",
    "attention": r"flash|fmha|attention",
    "norm, RoPE, SwiGLU, loss (Liger)": r"liger|_rms_norm|_swiglu|_rope|rope_|cross_entropy",
    "copies and casts": r"copy|Memcpy|Memset|Cat|fill",
    "element by element": r"elementwise|reduce|softmax|embedding|vectorized",
    "optimiser": r"multi_tensor|adam",
}
OTHERS = "the rest"


def by_kind(profile: list[list]) -> dict[str, float]:
    """Milliseconds of each kind of kernel."""
    found = dict.fromkeys([*KINDS, OTHERS], 0.0)
    for name, ms in profile:
        found[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHERS)] += ms
    return found


def plot(result: dict, path: Path) -> None:
    """Draw the bars."""
    rows = [row for row in result["results"] if row.get("profile")]
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(rows) + 1.7), layout="constrained")
    left = [0.0] * len(rows)
    for kind in [*KINDS, OTHERS]:
        sizes = [by_kind(row["profile"])[kind] for row in rows]
        axes.barh(range(len(rows)), sizes, left=left, label=kind)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.plot([1000 * row["seconds"] for row in rows], range(len(rows)), "k|", markersize=22)
    axes.set_yticks(range(len(rows)), [f"{row['row']}\n{row['tokens_per_second']:,.0f} tokens/s" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(
        f"ms of kernels in a step of {rows[0]['length']:,} tokens, {result['about']['device']}; black: the step"
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.22), ncols=4, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("numbers", type=old_file, help="what benchmarks/training.py --profile wrote")
    parser.add_argument("image", type=new_file)
    args = parser.parse_args()
    with parser.refusing():
        numbers = json.loads(args.numbers.read_text())
        if not isinstance(numbers, dict) or not all("profile" in row for row in numbers.get("results", [{}])):
            raise ValueError(f"{args.numbers}: it was not written by benchmarks/training.py --profile.")
    plot(numbers, args.image)


if __name__ == "__main__":
    main()

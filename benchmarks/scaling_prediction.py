"""What `scaling_model.py` says of a shape whose weights are sharded with FSDP2, from the rows of Llama-3.1-8B's shape.

Time a token grows with the work (`peft_longlora.memory.estimate.flops`), activations with the model's width and with
the number of inputs that are kept. Weights are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shapes import LLAMA_3_8B, SHAPES
from transformers import LlamaConfig

from peft_longlora.memory.estimate import Shape, flops

if TYPE_CHECKING:
    from scaling_model import Model

NVLINK_BYTES_A_SECOND = 300e9  # assumed of an all-gather, per GPU; the links have 450e9 by the datasheet
GROUP = 8192
BLOCK = 4  # layers, where there are blocks
GIB_OF = {"H200": 138.0, "H100": 78.0}  # less what CUDA and NCCL take
# GPUs of a machine, their kind, tokens in all; or how memory is saved, for the longest row that fits.
CASES: tuple[tuple[int, str, int | str], ...] = (
    (8, "H200", 2**20),
    (8, "H100", 2**20),
    (4, "H200", 2**20),
    (4, "H100", 2**18),
    (8, "H200", "tiles, blocks"),
    (8, "H200", "tiles, blocks, offloaded"),
    (8, "H100", "tiles, blocks, offloaded"),
)
HEAD = (
    "GPUs",
    "tokens in all",
    "how",
    "weights, a GPU",
    "gathered",
    "activations",
    "peak a GPU",
    "host",
    "step",
    "gathers, if nothing hides them",
    "tokens/s a GPU",
    "measured step",
    "measured peak",
)


def inputs_kept(how: str, layers: int) -> float:
    """Inputs of layers and blocks that are on the GPU at once, in hidden states of the row."""
    if "offloaded" in how:
        return BLOCK
    return layers / BLOCK + BLOCK if "blocks" in how else layers


@dataclass(frozen=True)
class Prediction:
    """A step of `each` tokens a GPU on `gpus` GPUs that share sequence and weights."""

    model: Model
    shape: Shape
    gpus: int
    each: int
    how: str

    @property
    def layer_gib(self) -> float:
        return 2 * (self.shape.attention_weights + self.shape.feed_forward_weights) / 2**30

    @property
    def table_gib(self) -> float:
        return 2 * self.shape.table / 2**30

    @property
    def weights_gib(self) -> float:
        return (self.shape.blocks * self.layer_gib + 2 * self.table_gib) / self.gpus

    @property
    def gathered_gib(self) -> float:
        """The layers of a block that are whole until its backward is over, one that comes, and the head."""
        return ((BLOCK if "blocks" in self.how else 1) + 1) * self.layer_gib + self.table_gib

    @property
    def gib_a_token(self) -> float:
        known = Shape.of(LlamaConfig(**LLAMA_3_8B))
        widths = self.model.slopes[self.how] * 2**30 / (2 * known.hidden)  # hidden states of the row
        inner = widths - inputs_kept(self.how, known.blocks)
        return (inputs_kept(self.how, self.shape.blocks) + inner) * 2 * self.shape.hidden / 2**30

    @property
    def gib(self) -> float:
        return self.weights_gib + self.gathered_gib + self.gib_a_token * self.each

    @property
    def host_gib(self) -> float:
        """Of the machine, for the inputs of blocks that wait there."""
        if "offloaded" not in self.how:
            return 0.0
        return self.gpus * self.shape.blocks / BLOCK * self.each * 2 * self.shape.hidden / 2**30

    @property
    def seconds(self) -> float:
        """Gathers beside the arithmetic. Sharing adds far squares, by layers and heads."""
        known = Shape.of(LlamaConfig(**LLAMA_3_8B))
        work = flops(self.shape, self.each, GROUP) / flops(known, self.each, GROUP)
        squares = self.shape.blocks * self.shape.query / (known.blocks * known.query)
        return self.model.slower[self.how] * self.model.c * work * self.each + self.model.h * squares

    @property
    def gather_seconds(self) -> float:
        """Each layer is gathered for the forward and for the backward, as `gib_gathered` of a tiny run says."""
        sent = 2 * self.shape.blocks * self.layer_gib + 3 * self.table_gib
        return sent * 2**30 * (self.gpus - 1) / self.gpus / NVLINK_BYTES_A_SECOND


def predict(model: Model, shape: Shape, gpus: int, wanted: int | str, gib: float) -> Prediction | None:
    """So many tokens with what fits and costs least time, None if nothing fits; or the longest row, in whole groups."""
    if isinstance(wanted, str):
        found = Prediction(model, shape, gpus, 0, wanted)
        return replace(found, each=int((gib - found.gib) / found.gib_a_token) // GROUP * GROUP)
    ways = (Prediction(model, shape, gpus, wanted // gpus, how) for how in model.slopes)
    return next((found for found in ways if found.gib < gib), None)


def sharded_table(model: Model, names: dict[str, str], rows: list[dict], name: str = "llama-3.3-70b") -> list[str]:
    """Predictions for a shape with sharded weights, beside what was measured, as in docs/scaling.md.

    Args:
        names: how each way of saving memory is called. rows: what `scaling_model.read` found of sharded runs.
    """
    shape = Shape.of(LlamaConfig(**SHAPES[name]))
    measured = {(row["gpus"], row["tokens"], row["how"].replace("plain", "plain, host")): row for row in rows}
    head = HEAD if rows else HEAD[:-2]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    found = [(predict(model, shape, gpus, wanted, GIB_OF[kind]), kind) for gpus, kind, wanted in CASES]
    predictions = {(one.gpus, one.gpus * one.each, one.how): (one, kind) for one, kind in found if one}
    for gpus, tokens, how in measured:
        predictions.setdefault((gpus, tokens, how), (Prediction(model, shape, gpus, tokens // gpus, how), ""))
    for key, (one, kind) in predictions.items():
        row = measured.get(key)
        cells = [
            f"{one.gpus} {kind}".strip(),
            f"{one.gpus * one.each:,}",
            names[one.how].lstrip(", ").replace("the same", "in tiles and blocks of 4 layers") or "plain",
            f"{one.weights_gib:.1f} GiB",
            f"{one.gathered_gib:.1f} GiB",
            f"{one.gib_a_token * one.each:.1f} GiB",
            f"{one.gib:.1f} GiB",
            f"{one.host_gib:,.0f} GiB" if one.host_gib else "",
            f"{one.seconds:.0f} s",
            f"{one.gather_seconds:.1f} s",
            f"{one.each / one.seconds:,.0f}",
            f"{row['seconds']:.2f} s" + ("" if row["is_warm"] else " (not warmed up)") if row else "",
            f"{row['peak_gib']:.1f} GiB" if row and row["peak_gib"] else "",
        ]
        lines.append(f"| {' | '.join(cells[: len(head)])} |")
    return lines

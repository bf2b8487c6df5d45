"""A model of time and memory of training on n GPUs that share a sequence, fitted to what `scaling.py` measured.

    python benchmarks/scaling_model.py benchmarks/results/scaling_2xh200*.json
    python benchmarks/scaling_model.py benchmarks/results/scaling_2xh200*.json \\
        --beside benchmarks/results/scaling_4xh200*.json

For l tokens a GPU of S in all, seconds of a step are c l + h for S2-Attn (h: what sharing adds) and a l + d l S for
dense attention; GiB are the weights and a slope times l. The network does not appear: per layer a GPU sends one halo
to its neighbour while it computes (docs/scaling.md). With --beside it prints what the model, fitted to the first
files, says of the rows in the others, beside what was measured. The last table is of a 70B shape whose weights are
sharded: predictions, and beside them rows of `scaling.py --shape llama-3.3-70b --sharded`, if --beside has any.
Hardware: any; it only reads the files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from options import Parser, old_file
from scaling_prediction import sharded_table

GIB_OF_A_GPU = 138.0  # of an H200's 140.4, less what CUDA and NCCL take
WEIGHTS_GIB = 14.96  # 8.03e9 numbers in bf16
HOST = "plain, host"  # what ranks send goes through the host's memory, and not over NVLink
COPIED, SHARDED = ("llama-3.1-8b", False), ("llama-3.3-70b", True)
KINDS = "llama-3.1-8b with copied weights and llama-3.3-70b with sharded ones"
OPTIONS = {"tiles": "tile", "blocks": "block", "offloaded": "offload"}  # of scaling.py, which trade time for memory
NAMES = {
    HOST: "",
    "tiles": ", in tiles",
    "tiles, blocks": ", in tiles and blocks of 4 layers",
    "tiles, blocks, offloaded": ", the same, blocks offloaded",
}


def read(paths: list[str]) -> list[dict]:
    rows = []
    for path in paths:
        with open(path) as file:
            found = json.load(file)
        about = found["about"]
        how = ", ".join(name for name, key in OPTIONS.items() if about.get(key)) or "plain"
        if about.get("environment", {}).get("NCCL_P2P_DISABLE") == "1":
            how = HOST
        kind = about.get("name", "llama-3.1-8b"), about.get("sharded", False)
        if kind not in (COPIED, SHARDED):
            raise ValueError(f"{path} is of {kind[0]}{', sharded' * kind[1]}. The model knows {KINDS}.")
        rows += [{**row, "how": how, "each": row["tokens"] // row["gpus"], "sharded": kind[1]} for row in found["rows"]]
    return rows


def of(rows: list[dict], attention: str, how: str = "plain") -> dict[int, dict]:
    """The rows of one kind by tokens a GPU; those measured more than once with their mean time."""
    found: dict[int, list[dict]] = {}
    for row in rows:
        if (row["attention"], row["how"]) == (attention, how):
            found.setdefault(row["each"], []).append(row)
    means = {each: sum(row["seconds"] for row in same) / len(same) for each, same in found.items()}
    return {
        each: {**same[0], "seconds": means[each], "tokens_per_second_per_gpu": each / means[each]}
        for each, same in found.items()
    }


def shared_table(rows: list[dict]) -> list[str]:
    """S2-Attn on one and on two GPUs, as in docs/scaling.md."""
    head = (
        "tokens a GPU",
        "1 GPU",
        "2 GPUs share",
        "rate a GPU, 2 to 1",
        "over NVLink",
        "peak a GPU",
        "sent a layer and step",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    over_nvlink = rates_of_two(rows, "plain")
    for how, name in NAMES.items():
        alone, rates = of(rows, "alone", how), rates_of_two(rows, how)
        found = sorted(of(rows, "s2", how).items())
        for each, row in found if how == HOST else found[-1:]:  # before the longest, a short one may warm up
            cells = [
                f"{each:,}{name}",
                f"{alone[each]['seconds']:.2f} s" if each in alone else "",
                f"{row['seconds']:.2f} s, {row['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU"
                + ("" if row["is_warm"] else " (not warmed up)"),
                f"{rates[each]:.1%}" if each in rates else "",
                f"{over_nvlink[each]:.1%}" if how == HOST and each in over_nvlink else "",
                f"{row['peak_gib']:.1f} GiB",
                f"{row['mib_sent_a_layer']:.0f} MiB",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def rates_of_two(rows: list[dict], how: str) -> dict[int, float]:
    """Rate a GPU where two share, in units of one GPU's, by tokens a GPU."""
    alone, shared = of(rows, "alone", how), of(rows, "s2", how)
    return {each: alone[each]["seconds"] / shared[each]["seconds"] for each in alone if each in shared}


def dense_table(rows: list[dict]) -> list[str]:
    """S2-Attn beside dense attention on two GPUs, as in docs/scaling.md."""
    head = "tokens in all, 2 GPUs", "S2-Attn", "Ulysses", "torch's ring", "peak a GPU, of each", "sent a layer and step"
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    ways = {"s2": HOST, "ulysses": "tiles", "ring": "tiles"}  # taken where there is no row like those of the others
    found = [{**of(rows, attention, other), **of(rows, attention)} for attention, other in ways.items()]
    for each in sorted(set.intersection(*map(set, found))):
        cells = [f"{each * 2:,}"]
        for row in (one[each] for one in found):
            notes = [] if row["how"] == "plain" else [{HOST: "through the host's memory"}.get(row["how"], "in tiles")]
            notes += [] if row["is_warm"] else ["not warmed up"]
            cells.append(f"{row['tokens_per_second_per_gpu']:,.0f}" + (f" ({', '.join(notes)})" if notes else ""))
        cells.append(", ".join(f"{one[each]['peak_gib']:.1f}" for one in found) + " GiB")
        sent = [one[each]["mib_sent_a_layer"] for one in found]
        cells.append(", ".join("not counted" if mib is None else f"{mib:,.0f} MiB" for mib in sent))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@dataclass
class Model:
    """Seconds and GiB of a step on n GPUs. The constants are fitted to rows on one and on two GPUs."""

    c: float  # seconds a token of S2-Attn
    h: float  # seconds that sharing adds to a step
    a: float  # seconds a token of dense attention
    d: float  # seconds a token and token of dense attention
    slopes: dict[str, float] = field(default_factory=dict)  # GiB a token, by how memory is saved
    slower: dict[str, float] = field(default_factory=dict)  # times the plain step's time

    def seconds(self, each: float, how: str) -> float:
        return self.slower[how] * self.c * each + self.h

    def dense_seconds(self, each: float, tokens: int) -> float:
        return (self.a + self.d * tokens) * each

    def gib(self, each: float, how: str) -> float:
        return WEIGHTS_GIB + self.slopes[how] * each


def fit(rows: list[dict]) -> Model:
    alone, shared, dense = of(rows, "alone", HOST), of(rows, "s2", HOST), of(rows, "ulysses")
    longest = max(alone)
    few, many = sorted(dense)[:2]
    per_few, per_many = dense[few]["seconds"] / few, dense[many]["seconds"] / many
    d = (per_many - per_few) / (2 * many - 2 * few)
    model = Model(
        c=alone[longest]["seconds"] / longest,
        h=max(shared[each]["seconds"] - alone[each]["seconds"] for each in alone),
        a=per_few - d * 2 * few,
        d=d,
    )
    for how in NAMES:
        each, row = max(of(rows, "s2", how).items())
        model.slopes[how] = (row["peak_gib"] - WEIGHTS_GIB) / each
        model.slower[how] = max(1.0, row["seconds"] / each / model.c) if how != HOST else 1.0
    return model


def beside_table(model: Model, rows: list[dict]) -> list[str]:
    """What the model says of rows on other numbers of GPUs, beside what was measured, as in docs/scaling.md."""
    head = (
        "GPUs",
        "tokens in all",
        "attention",
        "1 GPU",
        "measured",
        "rate a GPU, to 1",
        "model's step",
        "peak a GPU",
        "model's peak",
        "sent a layer and step",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    found = {(row["attention"], row["how"], row["each"]) for row in rows if row["attention"] != "alone"}
    for attention, how, each in sorted(found, key=lambda x: (x[2], ["s2", "ulysses", "ring"].index(x[0]))):
        row, alone = of(rows, attention, how)[each], of(rows, "alone", how).get(each)
        kind = HOST if how == "plain" else how
        is_s2 = attention == "s2"
        seconds = model.seconds(each, kind) if is_s2 else model.dense_seconds(each, row["tokens"])
        cells = [
            f"{row['gpus']}",
            f"{row['tokens']:,}{NAMES[kind].replace(', the same,', ', in tiles and blocks of 4 layers,')}",
            {"s2": "S2-Attn", "ulysses": "Ulysses", "ring": "torch's ring"}[attention],
            f"{alone['seconds']:.2f} s" if alone and is_s2 else "",
            f"{row['seconds']:.2f} s" + ("" if row["is_warm"] else " (not warmed up)"),
            f"{alone['seconds'] / row['seconds']:.1%}" if alone and is_s2 else "",
            f"{seconds:.2f} s",
            f"{row['peak_gib']:.1f} GiB",
            f"{model.gib(each, kind):.1f} GiB" if is_s2 else "",
            f"{row['mib_sent_a_layer']:,.0f} MiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", type=old_file, help="what scaling.py wrote, with 1 and with 2 GPUs")
    parser.add_argument("--beside", nargs="+", type=old_file, default=[], help="the same of other numbers of GPUs")
    args = parser.parse_args()
    with parser.refusing():
        try:
            rows, others = read(args.files), read(args.beside)
        except (KeyError, TypeError):
            raise ValueError("a file was not written by benchmarks/scaling.py.") from None
        sharded = [row for row in others if row["sharded"] and row["attention"] == "s2"]
        others = [row for row in others if not row["sharded"]]
        rows = [row for row in rows if not row["sharded"]]
        if not all(of(rows, *way) for way in (("alone", HOST), ("s2", HOST), ("ulysses",))):
            raise ValueError("the files lack rows of alone, s2 or ulysses. Give all files of a run.")
    model = fit(rows)
    alone, shared = of(rows, "alone", HOST), of(rows, "s2", HOST)
    print(f"S2-Attn: c = {model.c * 1e6:.1f} microseconds a token, h = {model.h:.3f} s a step")
    print("\ntokens a GPU   1 GPU s   2 GPUs s   rate of 2 / 1   model of 2")
    for each in sorted(alone):
        one, two = alone[each]["seconds"], shared[each]["seconds"]
        print(f"{each:12d} {one:9.3f} {two:10.3f} {one / two:15.1%} {model.seconds(each, HOST):12.3f}")
    print(
        f"\ndense (Ulysses): a = {model.a * 1e6:.1f} microseconds a token, d = {model.d * 1e9:.3f} ns a token and token"
    )
    for attention in ("ulysses", "ring"):
        row = next(row for row in rows if row["attention"] == attention and row["tokens"] == 131072)
        expected = model.dense_seconds(65536, 131072)
        print(f"  131072 tokens on 2: model {expected:.1f} s, {attention} {row['seconds']:.1f} s")
    for how in NAMES:
        most = int((GIB_OF_A_GPU - WEIGHTS_GIB) / model.slopes[how])
        kib = model.slopes[how] * 2**20
        print(f"{how:24s} {kib:6.1f} KiB a token, {model.slower[how]:.2f} times the time, most {most} tokens a GPU")
    print("\n  GPUs   tokens in all     a GPU how                        GiB   seconds   dense, seconds")
    for gpus, tokens in ((8, 2**20), (8, 2**22), (8, 2**23), (64, 2**23), (64, 2**26), (1024, 10**8), (1024, 2**30)):
        each = tokens / gpus
        fits = [how for how in NAMES if model.gib(each, how) < GIB_OF_A_GPU]
        if not fits:
            print(f"{gpus:6d} {tokens:15d} {each:9.0f} does not fit")
            continue
        how = fits[0]
        gib, seconds = model.gib(each, how), model.seconds(each, how)
        print(
            f"{gpus:6d} {tokens:15d} {each:9.0f} {how:24s} {gib:5.0f} {seconds:9.1f}"
            f" {model.dense_seconds(each, tokens):16.0f}"
        )
    print("", *shared_table(rows), "", *dense_table(rows), sep="\n")
    if others:
        print("", *beside_table(model, others), sep="\n")
    print("", *sharded_table(model, NAMES, sharded), sep="\n")


if __name__ == "__main__":
    main()

"""The tables of docs/attention.md, docs/performance.md and the README, from the numbers that the benchmarks wrote.

    python benchmarks/tables.py benchmarks/results/attention_h200.json benchmarks/results/variants_h200.json
    python benchmarks/tables.py --together benchmarks/results/training_7b_full_*_h100.json

The kind of table follows from what is in the file. --together makes one table of several files of training.py. A test
compares the tables with the pages.
"""

import json

from options import Parser, old_file


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def number(row: dict, key: str, digits: int = 2) -> str:
    return f"{row[key]:.{digits}f}" if key in row else ""


def attention_table(result: dict) -> list[str]:
    """Every method of every case."""
    head = ["H / H_kv, N, G", "method", "fwd ms", "fwd + bwd ms", "TFLOP/s", "R fwd", "R", "R as CUDA graph"]
    rows = []
    for case in result["cases"]:
        label = case["name"]
        for name, row in case["rows"].items():
            name = name.replace("full ", "full, ", 1).replace("S2 ", "S2, ", 1)
            ratio = number(row, "R")
            cells = [
                number(row, "forward_ms"),
                number(row, "both_ms"),
                number(row, "tflops", 0),
                number(row, "R_forward"),
            ]
            cells += [f"**{ratio}**" if name == "S2, flash_attention_4" else ratio, number(row, "R_graph")]
            rows.append([label, name, *cells, number(row, "faster_than_original"), number(row, "peak_mib", 0)])
            label = ""
    return table([*head, "x original", "peak MiB"], rows)


def short_table(result: dict) -> list[str]:
    """The fastest kernel in every case."""
    rows = []
    for case in result["cases"]:
        full, row = (case["rows"][f"{name} flash_attention_4"] for name in ("full", "S2"))
        cells = number(full, "both_ms"), number(row, "both_ms"), f"{case['share']:.3f}", number(row, "R")
        rows.append([case["name"], *cells, number(row, "faster_than_original")])
    return table(["H / H_kv, N, G", "full, ms", "S2, ms", "share of the work", "R", "x original"], rows)


def growth_table(result: dict) -> list[str]:
    """Time and work a token at a fixed group size."""
    keys = dict(both_ms=2, us_a_token=4, keys_a_token=0, ns_a_key=4, peak_mib=0)
    rows = [[str(row["tokens"]), *(number(row, *key) for key in keys.items())] for row in result["growth"]]
    return table(["tokens", "ms", "us a token", "keys a token and head", "ns a key", "peak MiB"], rows)


def variants_table(result: dict) -> list[str]:
    """The ways of computing it, in one run."""
    keys = dict(forward_ms=2, both_ms=2, R_forward=2, R_backward=2, R=3, graph_ms=2, host_ms=2)
    rows = [[name, *(number(row, *key) for key in keys.items())] for name, row in result["rows"].items()]
    return table(["", "fwd ms", "fwd + bwd ms", "R fwd", "R bwd", "R", "as CUDA graph ms", "host ms"], rows)


def training_table(result: dict) -> list[str]:
    """Steps of training, one means more in each row; what did not fit or is missing is named."""
    head = ["", "tokens", "s a step", "tokens/s", "of the peak rate", "peak GiB", "expected GiB"]
    with_host = any(row.get("host_gib") for row in result["results"])
    rows = []
    for row in result["results"]:
        means = ", ".join(f"{key}={value}" for key, value in row["options"].items()) if row["row"] == "by hand" else ""
        after = "; ".join(filter(None, (means, row.get("unfinished"))))
        name = [row["row"] + (f" ({after})" if after else ""), f"{row['length']:,}"]
        if row["seconds"] is None:
            reason = "left out: " + row["missing"] if row.get("missing") else "out of memory"
            rows.append([*name, reason, "", "", "", "", *([""] if with_host else [])])
            continue
        cells = f"{row['seconds']:.2f}", f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.0%}"
        cells += f"{row['peak_gib']:.1f}", number(row, "expected_gib", 1)
        rows.append([*name, *cells, *([number(row, "host_gib", 1)] if with_host else [])])
    return table([*head, "host GiB"] if with_host else head, rows)


FULL = {
    "liger": "S2 (FlashAttention-4)",
    "liger, full": "full (FlashAttention-4)",
    "liger, full by PyTorch": "full (PyTorch's choice)",
}


def full_table(result: dict) -> list[str]:
    """Steps with S2-Attn and with full attention, all else equal."""
    sparse = {row["length"]: row["seconds"] for row in result["results"] if row["row"] == "liger"}
    rows = []
    for row in result["results"]:
        cells = f"{row['length']:,}", f"{row['seconds']:.2f}", f"{row['tokens_per_second']:,.0f}"
        ratio = "" if row["row"] == "liger" else f"{row['seconds'] / sparse[row['length']]:.2f} times as fast"
        rows.append([FULL[row["row"]], *cells, number(row, "peak_gib", 1), ratio])
    return table(["attention while training", "tokens", "s a step", "tokens/s", "peak GiB", "S2 is"], rows)


def together(results: list[dict]) -> dict:
    """The rows of several runs of training.py as if one had written them."""
    return dict(results=[row for result in results for row in result["results"]])


def losses_table(result: dict, every: int = 7) -> list[str]:
    """The losses of two rows or more after some steps."""
    rows = [row for row in result["results"] if row["seconds"]]
    steps = range(1, min(len(row["losses"]) for row in rows) + 1, every)
    lines = [[row["row"], *(f"{row['losses'][step - 1]:.3f}" for step in steps)] for row in rows]
    return table(["loss at step", *map(str, steps)], lines)


def tables(result: dict) -> dict[str, list[str]]:
    """The tables that the numbers of one file make."""
    if "results" in result:
        has_curves = all(len(row.get("losses", [])) >= 50 for row in result["results"])
        compares = {row["row"] for row in result["results"]} == set(FULL) and all(
            r["seconds"] for r in result["results"]
        )
        beside = {"full": full_table(result)} if compares else {}
        losses = {"losses": losses_table(result)} if has_curves else {}
        return {"training": training_table(result)} | beside | losses
    if "rows" in result:
        return {"variants": variants_table(result)}
    found = {"attention": attention_table(result)}
    if all("S2 flash_attention_4" in case["rows"] for case in result["cases"]):
        found["short"] = short_table(result)
    if result["growth"]:
        found["growth"] = growth_table(result)
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", type=old_file, help="what attention.py, variants.py or training.py wrote")
    parser.add_argument("--together", action="store_true", help="one table of all files, which training.py wrote")
    args, found = parser.parse_args(), {}
    for path in args.files:
        with parser.refusing():
            found[path] = json.loads(path.read_text())
            if not isinstance(found[path], dict) or not {"cases", "rows", "results"} & set(found[path]):
                raise ValueError(f"{path}: none of these scripts wrote it.")
            if args.together and "results" not in found[path]:
                raise ValueError(f"{path}: training.py did not write it, so --together does not take it.")
    if args.together:
        found = {", ".join(map(str, found)): together(list(found.values()))}
    for path, result in found.items():
        for name, lines in tables(result).items():
            print(f"\n{path}: {name}\n", *lines, sep="\n")


if __name__ == "__main__":
    main()

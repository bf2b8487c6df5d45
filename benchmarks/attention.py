"""Time S2-Attn against full attention and against the older ways of computing it, on this machine.

    python benchmarks/attention.py                   # the table of docs/attention.md (one GPU, a few minutes)
    python benchmarks/attention.py --tiny            # every path on small shapes, on a CPU too
    python benchmarks/attention.py --pattern local   # another pattern in S2's place

Every method is first compared with the float32 reference, outputs and gradients. Then it runs without pause for
`--seconds` to reach the clock that the power limit allows, and the median of as many seconds more is taken, while the
host stays ahead of the device as it does in training.

R = time(S2) / (time(full attention, same kernel) x share), share = causal work of S2 over that of full attention on the
same documents. R = 1 means that S2 costs exactly its share.
"""

import json
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial

import torch
from measure import Case, error, inputs, measure, replay, versions
from options import Parser, above_zero, count, device_here, new_file, positive
from ways import permute_varlen, roll, two_calls_fa4

from peft_longlora.kernels import backends
from peft_longlora.kernels.attend import attend
from peft_longlora.kernels.cuts import Cuts
from peft_longlora.kernels.groups import Groups
from peft_longlora.kernels.kernel import Needs, Options
from peft_longlora.kernels.patterns import PATTERNS
from peft_longlora.reference import s2_attention_reference


def packed_documents(count: int, total: int, shortest: int, longest: int) -> list[int]:
    """Lengths spread evenly over a log scale, shuffled with one seed, that add up to `total`."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(count, generator=generator).sort().values
    lengths = (shortest * (longest / shortest) ** scale).long()
    lengths[0], lengths[-1] = shortest, longest
    middle = slice(1, count - 1)
    lengths[middle] = (lengths[middle] * (total - shortest - longest) / lengths[middle].sum()).long()
    lengths[middle] = lengths[middle].clamp(shortest, longest)
    lengths[count * 3 // 4] += total - lengths.sum()
    assert shortest <= lengths.min() and lengths.max() <= longest and lengths.sum() == total
    return lengths[torch.randperm(count, generator=generator)].tolist()


def cases(is_tiny: bool) -> list[Case]:
    if is_tiny:
        documents = packed_documents(6, 512, 8, 256)
        return [Case("tiny 4/2", 4, 2, 16, 256, 64), Case("tiny packed", 4, 2, 16, 512, 64, documents)]
    documents = packed_documents(32, 131072, 256, 16384)
    return [
        Case("32/8, N 32768, G 8192", 32, 8, 128, 32768, 8192),
        Case("32/8, N 65536, G 8192", 32, 8, 128, 65536, 8192),
        Case("32/32, N 32768, G 8192", 32, 32, 128, 32768, 8192),
        Case("9/3, D 64, N 32768, G 8192", 9, 3, 64, 32768, 8192),
        Case("32/8, 32 documents of 256 to 16384, 131072 in all, G 8192", 32, 8, 128, 131072, 8192, documents),
    ]


@dataclass
class Method:
    name: str
    call: object
    full: str | None = None  # the method that R compares with
    is_exact: bool = True
    errors: list[float] = field(default_factory=list)


def engine(pattern: str, backend: str, q, k, v, case: Case) -> torch.Tensor:
    key = (id(case), pattern)
    if key not in _PLANS:
        _PLANS[key] = case.plan(pattern)
    return attend(q, k, v, Cuts.of(_PLANS[key]), Options(backend=backend))


_PLANS: dict[tuple[int, str], Groups] = {}


def methods(case: Case, device: torch.device, dtype: torch.dtype, only: list[str] | None) -> list[Method]:
    found = []
    needs = Needs(device, dtype, case.dim, case.dim, case.heads > case.kv_heads, requires_grad=True)
    for backend in backends.BACKENDS:
        reason = backends.BACKENDS[backend].missing(device) or backends.BACKENDS[backend].lacks(needs)
        if backend == "cudnn" and case.documents:
            reason = "documents of many lengths need a plan of cuDNN's for each"
        if reason or (only and backend not in only):
            print(f"   {backend}: {reason or 'left out'}", flush=True)
            continue
        found.append(Method(f"full {backend}", partial(engine, "full", backend), f"full {backend}"))
        name = "S2" if case.pattern == "s2" else case.pattern
        found.append(Method(f"{name} {backend}", partial(engine, case.pattern, backend), f"full {backend}"))
        if backend == "flash_attention_4" and case.pattern == "s2":
            found.append(Method("S2 two plain calls, flash_attention_4", two_calls_fa4, f"full {backend}"))
    full = "full varlen" if device.type == "cuda" else "full sdpa"
    if case.heads % 2 == 0 and case.pattern == "s2":
        found.append(Method("S2 permute + varlen (original)", permute_varlen, full))
        found.append(Method("S2 permute + varlen, unbound", partial(permute_varlen, slices=False), full))
        if case.documents is None:
            found.append(Method("S2 roll (wraps)", roll, full, is_exact=False))
    return found


def check(case: Case, found: list[Method], device: torch.device, dtype: torch.dtype) -> None:
    """Fill in relative errors of output, dq, dk, dv against the float32 reference, on a short case of these heads."""
    tokens = min(2048, case.tokens)
    group, documents = tokens // 4, None
    if case.documents:
        documents = [tokens * length // 2048 for length in (100, 300, 1000, 648)]
    short = Case("check", case.heads, case.kv_heads, case.dim, tokens, group, documents, case.pattern)
    qkv, dout = inputs(short, device, dtype)
    plain = [x.detach().float().requires_grad_() for x in qkv]
    ids = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(documents))[None].to(device) if documents else None
    for pattern in (case.pattern, "full"):
        want = s2_attention_reference(*plain, group, segment_ids=ids, pattern=pattern)
        want = [want, *torch.autograd.grad(want, plain, dout.float())]
        for method in found:
            if method.name.startswith("full") == (pattern == "full"):
                got = method.call(*qkv, short)
                got = [got, *torch.autograd.grad(got, qkv, dout)]
                method.errors = [error(a, b) for a, b in zip(got, want, strict=True)]
                most = 1e-5 if dtype == torch.float32 else 0.01
                if method.is_exact and not max(method.errors) < most:  # NaN is wrong too
                    raise SystemExit(f"{method.name} is wrong: relative errors {method.errors}, {case.name}")


def run_case(case: Case, device, dtype, args) -> dict:
    print(f"\n{case.name} (share {case.share:.4f})", flush=True)
    found = methods(case, device, dtype, args.backends)
    check(case, found, device, dtype)
    qkv, dout = inputs(case, device, dtype)
    # The rounds go over all methods, so that a slow drift of the clock meets each of them.
    rounds: dict[str, list[dict]] = {method.name: [] for method in found}
    rows: dict[str, dict] = {}
    for number in range(args.rounds):
        for method in [m for m in found if m.name in rounds]:
            print(f"   ... {method.name}, round {number + 1}", file=sys.stderr, flush=True)
            try:
                measured = measure(lambda *x, m=method: m.call(*x, case), qkv, dout, args.seconds)
                rounds[method.name].append(measured)
            except torch.OutOfMemoryError:
                print(f"   {method.name}: out of memory", flush=True)
                del rounds[method.name]
                torch.cuda.empty_cache()
    for method in [m for m in found if m.name in rounds]:
        row = {key: statistics.median(x[key] for x in rounds[method.name]) for key in rounds[method.name][0]}
        row["both_ms_of_rounds"] = [x["both_ms"] for x in rounds[method.name]]
        row["errors"] = method.errors
        row["full"] = method.full
        if args.graphs and method.full == "full flash_attention_4" and "plain" not in method.name:
            row["graph_ms"] = replay(lambda *x, m=method: m.call(*x, case), qkv, dout, args.seconds)
        rows[method.name] = row
    _PLANS.clear()
    original = rows.get("S2 permute + varlen (original)", {}).get("both_ms")
    print(f"   {'':38} {'fwd ms':>8} {'f+b ms':>8} {'TFLOP/s':>8} {'R fwd':>6} {'R':>6} {'graph R':>7} {'x orig':>6} "
          f"{'peak MiB':>8} {'host ms':>7}  error")  # fmt: skip
    for name, row in rows.items():
        full = rows.get(row["full"])
        is_full = name.startswith("full")
        pairs = case.pairs("full" if is_full else case.pattern)
        row["tflops"] = 3.5 * 4 * pairs * case.dim / row["both_ms"] / 1e9
        if full and not is_full:
            row["R_forward"] = row["forward_ms"] / full["forward_ms"] / case.share
            row["R"] = row["both_ms"] / full["both_ms"] / case.share
            if "graph_ms" in row:
                row["R_graph"] = row["graph_ms"] / full["graph_ms"] / case.share
        if original and not is_full:
            row["faster_than_original"] = original / row["both_ms"]
        show = [f"{row[x]:.3f}" if x in row else "" for x in ("R_forward", "R", "R_graph", "faster_than_original")]
        print(f"   {name:38} {row['forward_ms']:8.3f} {row['both_ms']:8.3f} {row['tflops']:8.1f} {show[0]:>6} "
              f"{show[1]:>6} {show[2]:>7} {show[3]:>6} {row['peak_mib']:8.0f} {row['host_ms']:7.2f}  "
              f"{max(row['errors']):.4f}", flush=True)  # fmt: skip
    return dict(vars(case), share=case.share, rows=rows)


def run_growth(device, dtype, args) -> list[dict]:
    """Time a token from 8k to 256k tokens at fixed G, by the backend that is chosen, and the work a token has."""
    lengths = [256, 512, 1024] if args.tiny else [2**n for n in range(13, 19)]
    shape, group = ((4, 2, 16), 64) if args.tiny else ((32, 8, 128), 8192)
    every = [Case("growth", *shape, n, group, pattern=args.pattern) for n in lengths]
    tensors = [inputs(case, device, dtype) for case in every]
    rounds: list[list[dict]] = [[] for _ in every]
    for _ in range(args.rounds):
        for case, (qkv, dout), measured in zip(every, tensors, rounds, strict=True):
            measured.append(measure(lambda *x, c=case: engine(c.pattern, None, *x, c), qkv, dout, args.seconds))
    _PLANS.clear()
    rows = []
    print("\ngrowth at fixed G", flush=True)
    for case, measured in zip(every, rounds, strict=True):
        row = {key: statistics.median(x[key] for x in measured) for key in measured[0]}
        row.update(tokens=case.tokens, us_a_token=row["both_ms"] * 1e3 / case.tokens)
        row["keys_a_token"] = case.pairs(case.pattern) / case.heads / case.tokens
        row["ns_a_key"] = row["us_a_token"] * 1e3 / row["keys_a_token"]
        rows.append(row)
        print(f"   {case.tokens:7} tokens {row['both_ms']:9.3f} ms, {row['us_a_token']:.4f} us a token, "
              f"{row['keys_a_token']:.0f} keys a token, {row['ns_a_key']:.4f} ns a key, "
              f"peak {row['peak_mib']:.0f} MiB", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes, float32 off the GPU")
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=backends.BACKENDS, help="default: all that run here")
    parser.add_argument("--pattern", choices=[name for name in PATTERNS if name != "full"], default="s2")
    parser.add_argument("--cases", type=count, nargs="+", help="numbers of the cases to run, from 0")
    parser.add_argument(
        "--seconds", type=above_zero, help="of warming and of measuring a method (default 0.4; tiny 0.01)"
    )
    parser.add_argument("--rounds", type=positive, default=1)
    parser.add_argument("--graphs", action="store_true", help="time FlashAttention-4 as a CUDA graph too")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--json", type=new_file, default="attention.json", help="where the numbers go")
    args = parser.parse_args()
    if unknown := set(args.cases or ()) - set(range(len(cases(args.tiny)))):
        parser.error(f"--cases {min(unknown)}: there are {len(cases(args.tiny))} cases, from 0")
    args.seconds = args.seconds or (0.01 if args.tiny else 0.4)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    result = dict(command="python " + shlex.join(sys.argv), **versions(device), dtype=str(dtype), cases=[], growth=[])
    print("\n".join(f"{key}: {value}" for key, value in result.items() if isinstance(value, str)), flush=True)

    def save() -> None:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)

    for number, case in enumerate(cases(args.tiny)):
        if args.cases is None or number in args.cases:
            case.pattern = args.pattern
            result["cases"].append(run_case(case, device, dtype, args))
            save()
    if not args.no_growth:
        result["growth"] = run_growth(device, dtype, args)
    save()
    print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    main()

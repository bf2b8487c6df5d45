"""Time S2-Attn against full attention and against the older ways of computing it, on this machine.

    python benchmarks/attention.py                   # the table of docs/attention.md (one GPU, a few minutes)
    python benchmarks/attention.py --tiny            # every path on small shapes, on a CPU too

Every method is first compared with the float32 reference, outputs and gradients. Then it runs without pause for
`--seconds` to reach the clock that the power limit allows, and the median of as many seconds more is taken, while the
host stays ahead of the device as it does in training.

R = time(S2) / (time(full attention, same kernel) x share), share = causal work of S2 over that of full attention on the
same documents. R = 1 means that S2 costs exactly its share.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from peft_longlora.kernels import attend as kernels
from peft_longlora.kernels import backends
from peft_longlora.kernels.groups import Groups, plan_groups, split_heads
from peft_longlora.kernels.kernel import Call
from peft_longlora.reference import s2_attention_reference


@dataclass
class Case:
    name: str
    heads: int
    kv_heads: int
    dim: int
    tokens: int
    group: int
    documents: list[int] | None = None

    def plan(self, pattern: str) -> Groups:
        lengths = self.documents or [self.tokens]
        starts = accumulate(lengths, initial=0)
        documents = [(start, length, 1) for start, length in zip(starts, lengths, strict=False)]
        return plan_groups(1, self.tokens, self.group, pattern, documents=documents)

    def pairs(self, pattern: str) -> float:
        """Query-key pairs over all heads: the causal work."""
        plan = self.plan(pattern)
        straight, _ = split_heads(self.heads, self.kv_heads)
        halves = (plan.straight, straight), (plan.shifted, self.heads - straight)
        return sum(n * sum((b - a) * (b - a + 1) / 2 for a, b in pairwise(cuts)) for cuts, n in halves)

    @property
    def share(self) -> float:
        return self.pairs("s2") / self.pairs("full")


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


def repeat_kv(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def roll(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> torch.Tensor:
    """The way of LongLoRA without flash attention, and of LLaMA-Factory. Its last shifted group wraps around."""
    batch, heads, length, dim = q.shape
    group = case.group

    def shift(x: torch.Tensor) -> torch.Tensor:
        x = repeat_kv(x, heads)
        x = torch.cat((x[:, : heads // 2], x[:, heads // 2 :].roll(-group // 2, 2)), 1)
        return x.transpose(1, 2).reshape(batch * length // group, group, heads, dim).transpose(1, 2)

    out = scaled_dot_product_attention(shift(q), shift(k), shift(v), is_causal=True)
    out = out.transpose(1, 2).reshape(batch, length, heads, dim)
    return torch.cat((out[:, :, : heads // 2], out[:, :, heads // 2 :].roll(group // 2, 1)), 2)


def permute_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case, slices=True) -> torch.Tensor:
    """The way of LongLoRA with FlashAttention-2: repeat KV, stack, permute, one call with cumulative lengths.

    `slices`: q, k and v are cut out of the stack one by one, whose backward is a zero-fill and an add for each;
    otherwise by one `unbind`, as far as that way can be mended without changing it.
    """
    _, heads, length, dim = q.shape
    plan = case.plan("s2")
    qkv = torch.stack((q, repeat_kv(k, heads), repeat_kv(v, heads)), 2).transpose(1, 3)  # (1, N, 3, H, D)
    qkv = qkv.reshape(1, length, 3, 2, heads // 2, dim).permute(0, 3, 1, 2, 4, 5).reshape(2 * length, 3, -1, dim)
    parts = (qkv[:, 0], qkv[:, 1], qkv[:, 2]) if slices else qkv.unbind(1)
    cuts = [*plan.straight, *(x + length for x in plan.shifted[1:])]
    if q.is_cuda:
        cu = torch.tensor(cuts, dtype=torch.int32).pin_memory().to(q.device, non_blocking=True)
        out = torch_varlen(*parts, cu, plan.max_length)
    else:
        pieces = (x.transpose(0, 1)[None] for x in parts)
        lengths = [b - a for a, b in pairwise(cuts)]
        parts = zip(*(x.split(lengths, 2) for x in pieces), strict=True)
        out = torch.cat([scaled_dot_product_attention(*x, is_causal=True) for x in parts], 2)[0].transpose(0, 1)
    return out.reshape(1, 2, length, heads // 2, dim).transpose(1, 2).reshape(1, length, heads, dim)


def torch_varlen(q, k, v, cu_seqlens: torch.Tensor, longest: int) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    try:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))
    except TypeError:  # torch before 2.12
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, is_causal=True)


def two_calls_fa4(q, k, v, case: Case) -> torch.Tensor:
    """The plain way on FlashAttention-4: its public function for each half of the heads, then a concatenation."""
    from flash_attn.cute import flash_attn_varlen_func

    h, h_kv = split_heads(case.heads, case.kv_heads)
    plan = case.plan("s2")
    q, k, v = (x.transpose(1, 2)[0] for x in (q, k, v))
    parts = []
    for cuts, heads, kv in (
        (plan.straight, slice(0, h), slice(0, h_kv)),
        (plan.shifted, slice(h, None), slice(h_kv, None)),
    ):
        cu = torch.tensor(cuts, dtype=torch.int32).pin_memory().to(q.device, non_blocking=True)
        cut = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=plan.max_length, max_seqlen_k=plan.max_length)
        out = flash_attn_varlen_func(q[:, heads], k[:, kv], v[:, kv], causal=True, **cut)
        parts.append(out[0] if isinstance(out, tuple) else out)
    return torch.cat(parts, 1)[None]


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
    return kernels.attend(q, k, v, _PLANS[key], backend=backend)


_PLANS: dict[tuple[int, str], Groups] = {}


def methods(case: Case, device: torch.device, dtype: torch.dtype, only: list[str] | None) -> list[Method]:
    found = []
    call = Call(device, dtype, case.dim, case.dim, case.heads > case.kv_heads, requires_grad=True)
    for backend in backends.BACKENDS:
        reason = backends.missing(backend, device) or backends.lacks(backend, call)
        if backend == "cudnn" and case.documents:
            reason = "documents of many lengths need a plan of cuDNN's for each"
        if reason or (only and backend not in only):
            print(f"   {backend}: {reason or 'left out'}", flush=True)
            continue
        found.append(Method(f"full {backend}", partial(engine, "full", backend), f"full {backend}"))
        found.append(Method(f"S2 {backend}", partial(engine, "s2", backend), f"full {backend}"))
        if backend == "flash_attention_4":
            found.append(Method("S2 two plain calls, flash_attention_4", two_calls_fa4, f"full {backend}"))
    full = "full varlen" if device.type == "cuda" else "full sdpa"
    if case.heads % 2 == 0:
        found.append(Method("S2 permute + varlen (original)", permute_varlen, full))
        found.append(Method("S2 permute + varlen, unbound", partial(permute_varlen, slices=False), full))
        if case.documents is None:
            found.append(Method("S2 roll (wraps)", roll, full, is_exact=False))
    return found


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v as a projection gives them, (B, S, H, D) in memory, and the gradient of the output."""
    shapes = case.heads, case.kv_heads, case.kv_heads, case.heads
    q, k, v, dout = (torch.randn(1, case.tokens, h, case.dim, device=device, dtype=dtype) for h in shapes)
    return [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)], dout


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def check(case: Case, found: list[Method], device: torch.device, dtype: torch.dtype) -> None:
    """Fill in relative errors of output, dq, dk, dv against the float32 reference, on a short case of these heads."""
    documents = [100, 300, 1000, 648] if case.documents else None
    short = Case("check", case.heads, case.kv_heads, case.dim, 2048, 512, documents)
    qkv, dout = inputs(short, device, dtype)
    plain = [x.detach().float().requires_grad_() for x in qkv]
    ids = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(documents))[None].to(device) if documents else None
    for pattern in ("s2", "full"):
        want = s2_attention_reference(*plain, 512, segment_ids=ids, pattern=pattern)
        want = [want, *torch.autograd.grad(want, plain, dout.float())]
        for method in found:
            if method.name.startswith("full") == (pattern == "full"):
                got = method.call(*qkv, short)
                got = [got, *torch.autograd.grad(got, qkv, dout)]
                method.errors = [error(a, b) for a, b in zip(got, want, strict=True)]
                most = 1e-5 if dtype == torch.float32 else 0.01
                if method.is_exact and not max(method.errors) < most:  # NaN is wrong too
                    raise SystemExit(f"{method.name} is wrong: relative errors {method.errors}, {case.name}")


def measure(call, qkv: list[torch.Tensor], dout: torch.Tensor, seconds: float) -> dict[str, float]:
    """Medians of forward and of forward + backward in ms, the host's ms an iteration, and peak memory above inputs."""
    is_cuda = dout.is_cuda

    def step(mark=lambda: None):
        mark()
        out = call(*qkv)
        mark()
        torch.autograd.grad(out, qkv, dout)
        mark()

    step()
    gc.collect()
    before, peak = 0, 0
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    step()
    if is_cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    once = time.perf_counter() - start
    count = max(3, min(1000, int(seconds / once)))
    for _ in range(count):  # to the clock that lasts
        step()
    if is_cuda:
        events = []

        def mark():
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        start = time.perf_counter()
        for _ in range(count):
            step(mark)
        host = (time.perf_counter() - start) / count * 1e3
        torch.cuda.synchronize()
        times = [(a.elapsed_time(b), a.elapsed_time(c)) for a, b, c in zip(*[iter(events)] * 3, strict=True)]
    else:
        stamps = []
        for _ in range(count):
            step(lambda: stamps.append(time.perf_counter()))
        times = [((b - a) * 1e3, (c - a) * 1e3) for a, b, c in zip(*[iter(stamps)] * 3, strict=True)]
        host = 0.0
    forward, both = (statistics.median(x) for x in zip(*times, strict=True))
    return dict(forward_ms=forward, both_ms=both, host_ms=host, peak_mib=peak / 2**20)


def replay(call, qkv: list[torch.Tensor], dout: torch.Tensor, seconds: float) -> float:
    """Median ms of forward + backward replayed as one CUDA graph: the device's time without the host's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(call(*qkv), qkv, dout)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        torch.autograd.grad(call(*qkv), qkv, dout)
    times = []
    stop = time.perf_counter() + 2 * seconds
    while time.perf_counter() < stop or len(times) < 6:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
        for event in events:
            event.record()
            graph.replay()
        torch.cuda.synchronize()
        times.extend(a.elapsed_time(b) for a, b in pairwise(events))
    return statistics.median(times[len(times) // 2 :])


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
        pairs = case.pairs("full" if is_full else "s2")
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
    every = [Case("growth", 4, 2, 16, n, 64) if args.tiny else Case("growth", 32, 8, 128, n, 8192) for n in lengths]
    tensors = [inputs(case, device, dtype) for case in every]
    rounds: list[list[dict]] = [[] for _ in every]
    for _ in range(args.rounds):
        for case, (qkv, dout), measured in zip(every, tensors, rounds, strict=True):
            measured.append(measure(lambda *x, c=case: engine("s2", None, *x, c), qkv, dout, args.seconds))
    _PLANS.clear()
    rows = []
    print("\ngrowth at fixed G", flush=True)
    for case, measured in zip(every, rounds, strict=True):
        row = {key: statistics.median(x[key] for x in measured) for key in measured[0]}
        row.update(tokens=case.tokens, us_a_token=row["both_ms"] * 1e3 / case.tokens)
        row["keys_a_token"] = case.pairs("s2") / case.heads / case.tokens
        row["ns_a_key"] = row["us_a_token"] * 1e3 / row["keys_a_token"]
        rows.append(row)
        print(f"   {case.tokens:7} tokens {row['both_ms']:9.3f} ms, {row['us_a_token']:.4f} us a token, "
              f"{row['keys_a_token']:.0f} keys a token, {row['ns_a_key']:.4f} ns a key, "
              f"peak {row['peak_mib']:.0f} MiB", flush=True)  # fmt: skip
    return rows


def versions(device: torch.device) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("flash-attn-4", "flash-attn", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cudnn"] = str(torch.backends.cudnn.version())
    else:
        found["device"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, float32 off the GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=backends.BACKENDS, help="default: all that run here")
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of the cases to run, from 0")
    parser.add_argument("--seconds", type=float, help="of warming and of measuring a method (default 0.4; tiny 0.01)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--graphs", action="store_true", help="time FlashAttention-4 as a CUDA graph too")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--json", default="attention.json", help="where the numbers go")
    args = parser.parse_args()
    args.seconds = args.seconds or (0.01 if args.tiny else 0.4)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    result = dict(command="python " + " ".join(sys.argv), **versions(device), dtype=str(dtype), cases=[], growth=[])
    print("\n".join(f"{key}: {value}" for key, value in result.items() if isinstance(value, str)), flush=True)

    def save() -> None:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)

    for number, case in enumerate(cases(args.tiny)):
        if args.cases is None or number in args.cases:
            result["cases"].append(run_case(case, device, dtype, args))
            save()
    if not args.no_growth:
        result["growth"] = run_growth(device, dtype, args)
    save()
    print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    main()

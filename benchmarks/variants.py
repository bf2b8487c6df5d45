"""Time other ways to compute S2-Attn with one kernel: the table "What was tried" of docs/attention.md.

    python benchmarks/variants.py                    # one GPU with FlashAttention-4, about a minute
    python benchmarks/variants.py --kernel varlen    # the same with another kernel

Every way is first compared with the float32 reference. Then all of them are measured in turn, `--rounds` times, as
benchmarks/attention.py does it, and the medians are printed. `--profile` adds the time of each GPU kernel.
"""

import json
import shlex
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
from measure import Case, error, inputs, measure, replay, versions
from options import Parser, above_zero, device_here, new_file, positive
from ways import two_calls_fa4

from peft_longlora.kernels.cuts import Boundaries, tensors_of
from peft_longlora.kernels.flash import FlashAttention4
from peft_longlora.kernels.groups import Groups, split_heads
from peft_longlora.kernels.kernel import Kernel, Pieces
from peft_longlora.kernels.launches import LEAST_BATCHED_WORK, Launch, plan_launches
from peft_longlora.kernels.operators import KERNELS
from peft_longlora.reference import s2_attention_reference


class WithPacking(FlashAttention4):
    """FlashAttention-4 as it comes: its forward puts the query heads of a KV head into one tile."""

    def forward(self, q, k, v, out, lse, pieces, scaling, softcap):
        more = dict(softmax_scale=scaling, out=out, lse=lse)
        self.load()._flash_attn_fwd(q, k, v, **self._where(pieces), **more)


@dataclass(frozen=True)
class Way:
    """How the launches of one attention are cut, ordered and put on streams.

    Attributes:
        forward, backward: "batches" of views or "pieces" with cumulative lengths.
        streams: "one", "equal" (a stream a launch), or "falling" (the same, of falling priority).
        order: "largest" launch first, or the short ends "first" or in the "middle".
        parts: into how many parts the heads of a half are cut once more.
        is_apart: an output and gradients of its own for each launch, concatenated: batches only of whole halves.
        packs: True for `WithPacking`.
    """

    forward: str = "batches"
    backward: str = "batches"
    streams: str = "falling"
    order: str = "largest"
    parts: int = 1
    is_apart: bool = False
    packs: bool = False


WAYS = {
    "an output a half, concatenated; cumulative lengths": Way("pieces", "pieces", "one", is_apart=True, packs=True),
    "one output, one dq, dk, dv; cumulative lengths, in order": Way("pieces", "pieces", "one", packs=True),
    "the same, a stream a launch": Way("pieces", "pieces", "equal", packs=True),
    "the same, streams of falling priority": Way("pieces", "pieces", packs=True),
    "batches of views instead of cumulative lengths, in order": Way(streams="one", packs=True),
    "batches, a stream a launch": Way(streams="equal", packs=True),
    "batches, streams of falling priority": Way(packs=True),
    "the same, heads of a KV head not packed into a tile (engine)": Way(),
    "engine, but in order": Way(streams="one"),
    "engine, but the short ends first": Way(order="first"),
    "engine, but the short ends in the middle": Way(order="middle"),
    "engine, but the heads of a half in two parts": Way(parts=2),
    "engine, but forward by cumulative lengths": Way("pieces"),
    "engine, but backward by cumulative lengths": Way(backward="pieces"),
}
ENGINE = "the same, heads of a KV head not packed into a tile (engine)"


def launches(way: Way, cut: str, bounds: Boundaries, q: torch.Tensor, k: torch.Tensor) -> list[Launch]:
    found = list(_cut(bounds, q.shape[1], k.shape[1], cut == "batches"))
    if way.order != "largest" and len(found) > 2:
        found.insert({"first": 0, "middle": 1}[way.order], found.pop())
    return [part for one in found for part in _part(one, way.parts)]


def _cut(bounds: Boundaries, heads: int, kv_heads: int, in_batches: bool) -> tuple[Launch, ...]:
    # With a head dim of 2^38 a launch counts as worth its batches, however small it is.
    return plan_launches(bounds, heads, kv_heads, LEAST_BATCHED_WORK, in_batches, not in_batches)


def _part(launch: Launch, parts: int) -> list[Launch]:
    (first, last), (kv_first, kv_last) = launch.heads, launch.kv_heads
    count = kv_last - kv_first
    parts = min(parts, count)
    ratio = (last - first) // count
    cuts = [count * i // parts for i in range(parts + 1)]
    return [
        replace(launch, heads=(first + a * ratio, first + b * ratio), kv_heads=(kv_first + a, kv_first + b))
        for a, b in pairwise(cuts)
    ]


@cache
def side_stream(index: int, priority: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(priority=priority)


def run(found: list[Launch], call, way: Way, device: torch.device) -> None:
    if device.type != "cuda" or way.streams == "one":
        for launch in found:
            call(launch)
        return
    current = torch.cuda.current_stream(device)
    start = current.record_event()
    used = []
    for index, launch in enumerate(found[:-1]):
        priority = max(index + 1 - len(found), -3) if way.streams == "falling" else 0
        stream = side_stream(index, priority)
        stream.wait_event(start)
        used.append(stream)
        with torch.cuda.stream(stream):
            call(launch)
    call(found[-1])
    for stream in used:
        current.wait_stream(stream)


def cuts_of(launch: Launch, bounds: Boundaries, cu_seqlens: torch.Tensor) -> Pieces:
    if launch.count:
        return Pieces(None, launch.piece)
    return Pieces(cu_seqlens[bounds.span(launch.half)], bounds.max_length(launch.half))


class Attend(torch.autograd.Function):
    """(N, H, D), (N, H_kv, D) -> (N, H, D): the engine's operators, with the choices of a `Way` left open."""

    @staticmethod
    def forward(ctx, q, k, v, groups: Groups, way: Way, kernel: Kernel):
        layout, cu_seqlens = tensors_of(groups, q.device)
        bounds = Boundaries.read(layout)
        found = launches(way, way.forward, bounds, q, k)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        out = None if way.is_apart else torch.empty_like(q)
        parts = {x: q.new_empty(q.shape[0], x.heads[1] - x.heads[0], q.shape[2]) for x in found if way.is_apart}

        def call(x: Launch) -> None:
            to = parts[x] if way.is_apart else x.tokens(out, x.heads)
            tensors = x.tokens(q, x.heads), x.tokens(k, x.kv_heads), x.tokens(v, x.kv_heads), to, x.sums(lse)
            kernel.forward(*tensors, cuts_of(x, bounds, cu_seqlens), q.shape[2] ** -0.5, 0.0)

        run(found, call, way, q.device)
        out = torch.cat([parts[x] for x in sorted(found, key=lambda x: x.heads)], 1) if way.is_apart else out
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.bounds, ctx.way, ctx.kernel = bounds, way, kernel
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        bounds, way, kernel = ctx.bounds, ctx.way, ctx.kernel
        found = launches(way, way.backward, bounds, q, k)
        grads = [torch.empty_like(x) for x in (q, k, v) if not way.is_apart]
        parts = {}

        def call(x: Launch) -> None:
            heads = x.heads, x.kv_heads, x.kv_heads
            if way.is_apart:
                to = [y.new_empty(y.shape[0], b - a, y.shape[2]) for y, (a, b) in zip((q, k, v), heads, strict=True)]
                parts[x] = to
            else:
                to = [x.tokens(y, cut) for y, cut in zip(grads, heads, strict=True)]
            given = x.tokens(dout, x.heads), x.tokens(q, x.heads), x.tokens(k, x.kv_heads), x.tokens(v, x.kv_heads)
            pieces = cuts_of(x, bounds, cu_seqlens)
            kernel.backward(*given, x.tokens(out, x.heads), x.sums(lse), *to, pieces, q.shape[2] ** -0.5, 0.0)

        run(found, call, way, q.device)
        if way.is_apart:
            ordered = sorted(found, key=lambda x: x.heads)
            grads = [torch.cat([parts[x][i] for x in ordered], 1) for i in range(3)]
        return *grads, None, None, None


def by_way(way: Way, kernel: Kernel):
    kept: dict[str, Groups] = {}

    def call(q, k, v, case: Case) -> torch.Tensor:
        groups = kept.setdefault(case.name, case.plan("s2"))
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return Attend.apply(*flat, groups, way, kernel).view(q.shape[0], q.shape[2], q.shape[1], -1)

    return call


def full(kernel: Kernel):
    kept: dict[str, Groups] = {}

    def call(q, k, v, case: Case) -> torch.Tensor:
        groups = kept.setdefault(case.name, case.plan("full"))
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return Attend.apply(*flat, groups, Way(), kernel).view(q.shape[0], q.shape[2], q.shape[1], -1)

    return call


@cache
def by_block_sparsity():
    """One launch for both halves: all heads, with FlashAttention-4's list of blocks for each head."""
    import cutlass.cute as cute
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit
    def is_before(batch, head, q_index, kv_index, seqlen_info, aux_tensors):
        return kv_index <= q_index

    size, kept = 128, {}

    def blocks(case: Case, device: torch.device):
        plan, count = case.plan("s2"), case.tokens // size
        first, last = torch.empty(2, case.heads, count, dtype=torch.int32)
        h, _ = split_heads(case.heads, case.kv_heads)
        for heads, cuts in ((slice(0, h), plan.straight), (slice(h, None), plan.shifted)):
            assert all(cut % size == 0 for cut in cuts)
            for a, b in pairwise(cuts):
                first[heads, a // size : b // size], last[heads, a // size : b // size] = a // size, b // size
        here = torch.arange(count, dtype=torch.int32).expand(case.heads, count)
        longest = torch.arange(case.group // size, dtype=torch.int32)
        one = torch.ones_like(here)

        def listed(start, many):
            lists = (start[..., None] + longest).clamp(max=count - 1)
            parts = one, here[..., None], many, lists
            return BlockSparseTensorsTorch(*(x[None].contiguous().to(device) for x in parts), block_size=(size, size))

        return listed(first, here - first), listed(here + 1, last - here - 1)

    def call(q, k, v, case: Case) -> torch.Tensor:
        if case.name not in kept:
            kept[case.name] = blocks(case, q.device)
        forward, backward = kept[case.name]
        out = flash_attn_func(
            *(x.transpose(1, 2) for x in (q, k, v)),
            mask_mod=is_before,
            block_sparse_tensors=forward,
            block_sparse_tensors_bwd=backward,
        )
        return out[0] if isinstance(out, tuple) else out

    return call


def truth(case: Case, qkv: list[torch.Tensor], dout: torch.Tensor) -> list[torch.Tensor]:
    """Output, dq, dk, dv in float32, by the definition."""
    plain = [x.detach().float().requires_grad_() for x in qkv]
    want = s2_attention_reference(*plain, case.group)
    return [want.detach(), *torch.autograd.grad(want, plain, dout.float())]


def profile(call, qkv: list[torch.Tensor], dout: torch.Tensor) -> dict[str, list[float]]:
    """Microseconds of every GPU kernel of one forward and backward, by name."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for _ in range(3):
        torch.autograd.grad(call(*qkv), qkv, dout)
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA]) as seen:
        torch.autograd.grad(call(*qkv), qkv, dout)
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in sorted(seen.events(), key=lambda e: e.time_range.start):
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:80]].append(event.time_range.elapsed_us())
    return dict(times)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--kernel", default="flash_attention_4", choices=KERNELS)
    parser.add_argument("--shape", type=positive, nargs=5, help="H, H_kv, D, N, G", default=[32, 8, 128, 32768, 8192])
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=above_zero, default=0.15, help="of warming and of measuring a way in a round")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--graphs", action="store_true", help="time the replay of a CUDA graph too")
    parser.add_argument("--profile", action="store_true", help="add the time of each GPU kernel to the JSON")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="ways whose names hold one of these")
    parser.add_argument("--json", type=new_file, default="variants.json", help="where the numbers go")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    heads, kv_heads, dim, tokens, group = args.shape
    if heads % kv_heads or group % 2:
        parser.error(f"--shape: H={heads} is to be a multiple of H_kv={kv_heads}, and G={group} an even number")
    case = Case(f"{heads}/{kv_heads}, D {dim}, N {tokens}, G {group}", heads, kv_heads, dim, tokens, group)
    kernel, is_fa4 = KERNELS[args.kernel], args.kernel == "flash_attention_4"
    calls = {"full attention": full(kernel)}
    if is_fa4:
        calls["full attention, heads of a KV head packed into a tile"] = full(WithPacking())
        calls["public function for each half, then a concatenation"] = two_calls_fa4
    for name, way in WAYS.items():
        can = {"batches": kernel.takes_batches, "pieces": kernel.takes_pieces}
        if can[way.forward] and can[way.backward]:
            calls[name] = by_way(way, WithPacking() if way.packs and is_fa4 else kernel)
    if is_fa4:
        calls["one launch, FlashAttention-4's block sparsity"] = lambda *given: by_block_sparsity()(*given)
    if args.only:
        calls = {n: x for n, x in calls.items() if n.startswith("full") or any(word in n for word in args.only)}
    result = dict(
        command="python " + shlex.join(sys.argv), **versions(device), case=case.name, share=case.share, rows={}
    )
    print("\n".join(f"{key}: {value}" for key, value in result.items() if isinstance(value, str)), flush=True)
    length = min(2048, tokens)
    check = Case("check", heads, kv_heads, dim, length, length // 4)
    short, short_dout = inputs(check, device, dtype)
    want = truth(check, short, short_dout)
    for name, call in list(calls.items()):
        if name.startswith("full"):
            continue
        got = call(*short, check)
        got = [got, *torch.autograd.grad(got, short, short_dout)]
        errors = [error(a, b) for a, b in zip(got, want, strict=True)]
        if not max(errors) < (1e-5 if dtype == torch.float32 else 0.01):  # NaN is wrong too
            raise SystemExit(f"{name} is wrong: relative errors {errors}")
    qkv, dout = inputs(case, device, dtype)
    rounds: dict[str, list[dict]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            rounds[name].append(measure(lambda *x, c=call: c(*x, case), qkv, dout, args.seconds))
    for name, call in calls.items():
        row = {key: statistics.median(x[key] for x in rounds[name]) for key in rounds[name][0]}
        row["spread_ms"] = max(x["both_ms"] for x in rounds[name]) - min(x["both_ms"] for x in rounds[name])
        if args.graphs and device.type == "cuda" and "public" not in name:
            row["graph_ms"] = replay(lambda *x, c=call: c(*x, case), qkv, dout, args.seconds)
        if args.profile and device.type == "cuda":
            row["kernels_us"] = profile(lambda *x, c=call: c(*x, case), qkv, dout)
        result["rows"][name] = row
    whole = result["rows"]["full attention"]
    heads = ("fwd ms", "f+b ms", "R fwd", "R bwd", "R", "spread", "graph", "host")
    print(f"\n{'':60} " + " ".join(f"{x:>7}" for x in heads))
    for name, row in result["rows"].items():
        share = 1.0 if name.startswith("full") else case.share
        back, whole_back = row["both_ms"] - row["forward_ms"], whole["both_ms"] - whole["forward_ms"]
        row["R_forward"] = row["forward_ms"] / whole["forward_ms"] / share
        row["R_backward"] = back / whole_back / share
        row["R"] = row["both_ms"] / whole["both_ms"] / share
        keys = ("forward_ms", "both_ms", "R_forward", "R_backward", "R", "spread_ms", "graph_ms", "host_ms")
        print(f"{name:60} " + " ".join(f"{row[x]:7.3f}" if x in row else " " * 7 for x in keys))
    for name in ("full attention", ENGINE):
        if "kernels_us" in result["rows"].get(name, {}):
            print(f"\n{name}, microseconds a GPU kernel")
            for kernel_name, times in result["rows"][name]["kernels_us"].items():
                print(f"   {sum(times):9.0f} = {' + '.join(f'{t:.0f}' for t in times)}  {kernel_name}")
    with open(args.json, "w") as file:
        json.dump(result, file, indent=1)
    print(f"\nwritten: {args.json}")


if __name__ == "__main__":
    main()

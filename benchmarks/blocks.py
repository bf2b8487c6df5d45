"""Time "adaptive" through each kernel beside S2-Attn and full attention, after a check of values and gradients.

    python benchmarks/blocks.py            # one Hopper GPU with FlashAttention-4, about two minutes
    python benchmarks/blocks.py --tiny     # small shapes, on a CPU too

A method that is wrong is reported with its errors and not timed, and the exit code is 1.
"""

import json
import shlex
import sys

import torch
from measure import Case, error, inputs, measure, versions
from options import Parser, above_zero, device_here, new_file

from peft_longlora.kernels import backends
from peft_longlora.kernels.attend import attend
from peft_longlora.kernels.blocks import BlockPlan
from peft_longlora.kernels.cuts import Cuts
from peft_longlora.kernels.kernel import Needs, Options
from peft_longlora.reference import s2_attention_reference

MOST = {torch.bfloat16: 0.02, torch.float32: 1e-4}


def cuts_of(case: Case, pattern: str) -> Cuts:
    if pattern != "adaptive":
        return Cuts.of(case.plan(pattern))
    return Cuts.by_blocks(BlockPlan.of(1, case.tokens, [(0, case.tokens, 1)], case.group, pattern))


def call_of(case: Case, pattern: str, backend: str | None):
    cuts, options = cuts_of(case, pattern), Options(backend=backend)
    return lambda q, k, v: attend(q, k, v, cuts, options)


def errors_of(case: Case, pattern: str, backend: str | None, device, dtype) -> list[float]:
    """Relative errors of output, dq, dk and dv against the float32 reference, on a short row of these heads."""
    tokens = min(2048, case.tokens)
    short = Case("check", case.heads, case.kv_heads, case.dim, tokens, tokens // 2)
    qkv, dout = inputs(short, device, dtype)
    plain = [x.detach().float().requires_grad_() for x in qkv]
    want = s2_attention_reference(*plain, short.group, pattern=pattern)
    got = call_of(short, pattern, backend)(*qkv)
    grads = (torch.autograd.grad(got, qkv, dout), torch.autograd.grad(want, plain, dout.float()))
    return [error(got, want), *(error(a, b) for a, b in zip(*grads, strict=True))]


def milliseconds_of_choice(case: Case, q: torch.Tensor, k: torch.Tensor, count: int = 20) -> float:
    """The choice of blocks alone, which no gradient passes: a mean."""
    plan = cuts_of(case, "adaptive").blocks
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(count + 3):
        if number == 3:
            begin.record()
        plan.find_seen(plan.arrange(q), plan.arrange(k))
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def run_case(case: Case, device, dtype, seconds: float) -> dict:
    print(f"\n{case.name}", flush=True)
    rows, qkv_dout = {}, inputs(case, device, dtype)
    needs = Needs(device, dtype, case.dim, case.dim, case.heads > case.kv_heads, requires_grad=True, blocks="adaptive")
    methods = [("full", None), ("s2", None)]
    for name, backend in backends.BACKENDS.items():
        if reason := backend.missing(device) or backend.lacks(needs):
            print(f"   adaptive {name}: {reason}", flush=True)
        elif name != "sdpa" or device.type == "cpu":  # on a GPU it gathers keys, and takes seconds
            methods.append(("adaptive", name))
    for pattern, backend in methods:
        name = f"{pattern} {backend or 'fastest'}"
        try:
            errors = errors_of(case, pattern, backend, device, dtype)
            row = dict(errors=errors, is_right=max(errors) < MOST[dtype])
            if row["is_right"]:
                row |= measure(call_of(case, pattern, backend), *qkv_dout, seconds)
        except Exception as problem:  # a kernel that does not compile is a result too
            row = dict(is_right=False, problem=f"{type(problem).__name__}: {problem}"[:500])
        rows[name] = row
        print(f"   {name:28} {json.dumps(row)}", flush=True)
    if device.type == "cuda":
        rows["choice alone"] = dict(forward_ms=milliseconds_of_choice(case, *qkv_dout[0][:2]))
        print(f"   choice alone                 {json.dumps(rows['choice alone'])}", flush=True)
    return dict(vars(case), rows=rows)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes, float32 off the GPU")
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--seconds", type=above_zero, help="of warming and of measuring a method (default 0.3; tiny 0.01)"
    )
    parser.add_argument("--json", type=new_file, default="blocks.json", help="where the numbers go")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    result = dict(command="python " + shlex.join(sys.argv), **versions(device), dtype=str(dtype), cases=[])
    cases = [Case("9/3, D 64, N 32768, G 8192", 9, 3, 64, 32768, 8192), Case("32/8, D 128", 32, 8, 128, 32768, 8192)]
    if args.tiny:
        cases = [Case("tiny 4/2", 4, 2, 16, 1024, 512)]
    for case in cases:
        result["cases"].append(run_case(case, device, dtype, args.seconds or (0.01 if args.tiny else 0.3)))
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    wrong = [name for case in result["cases"] for name, row in case["rows"].items() if not row.get("is_right", True)]
    print(f"\nwritten: {args.json}; wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

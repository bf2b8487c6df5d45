"""`longlora plan`: what a training step needs, what to switch on, how long it takes and what it costs."""

from __future__ import annotations

import argparse
import contextlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from .arguments import Command, numbers, positive, tokens

if TYPE_CHECKING:
    from peft_longlora.memory.estimate import Shape, Training
    from peft_longlora.memory.plan import MemoryPlan

GIB = 2**30


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `longlora plan`."""
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id of a base, or llama-2-7b, llama-3.1-8b, llama-3.3-70b ...")
    add("--context", required=True, type=tokens, help="tokens of a row, such as 131072 or 128k; batch 1")
    add("--gpu-memory", required=True, type=size, help="of one GPU, such as 24GiB or 80GB")
    add("--host-memory", type=size, default="128GiB", help="of the machine, for each GPU (128GiB)")
    add("--gpus", type=positive, default=1, help="GPUs that share a row (%(default)s)")
    add("--four-bit", action="store_true", help="a base in NF4 (bitsandbytes)")
    add("--rank", type=positive, default=16, help="of LoRA on q, k, v and o (%(default)s)")
    add("--no-embeddings", action="store_true", help="train LoRA and norms alone")
    add("--logits", action="store_true", help="a loss that makes the logits of the whole row")
    add("--accumulate", action="store_true", help="gradients of several rows are summed before a step")
    add("--group-size", type=tokens, help="tokens of a group (default: a quarter of the row)")
    add("--tokens", type=amount, default="100M", help="tokens to train on, such as 100M or 1B (100M)")
    add("--gpu", default="H100", help="whose measured rate is taken (%(default)s)")
    add("--tokens-per-second", type=float, help="of one GPU, if you have measured it yourself")
    add("--price-per-hour", type=float, help="of one GPU, in any currency")


def size(text: str) -> int:
    """Parse a size such as 24GiB or 80GB; returns bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|MiB|MB)", text.strip(), flags=re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 24GiB or 80GB")
    units = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}
    return int(float(found[1]) * units[found[2].lower()])


def amount(text: str) -> int:
    """Parse a number of tokens such as 100M, 1B or 32768."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MB])", text.strip(), flags=re.IGNORECASE)
    if found and float(found[1]):
        return int(float(found[1]) * {"m": 10**6, "b": 10**9}[found[2].lower()])
    with contextlib.suppress(argparse.ArgumentTypeError):
        if len(some := numbers(text)) == 1:
            return some[0]
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 100M or 1B")


def group_size(args: argparse.Namespace) -> int:
    """Tokens of a group, at most the row.

    Raises: ValueError: `LongLoraConfig` refuses the group size, the rank or the window.
    """
    from peft_longlora import LongLoraConfig

    config = LongLoraConfig(r=args.rank, context_length=args.context, group_size=args.group_size)
    return min(config.group_size_on(args.context), args.context)


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns 0 if the step fits and 1 if it does not."""
    from peft_longlora.hub.loading import check_place
    from peft_longlora.memory.estimate import SHAPES, Training, best_estimate, find_shape, longest
    from peft_longlora.memory.plan import ESTIMATED_FILLED, HOST_FILLED
    from peft_longlora.memory.rates import check_gpu

    group = group_size(args)
    for name in ("tokens_per_second", "price_per_hour"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be above 0.")
    if args.tokens_per_second is None:
        check_gpu(args.gpu)
    if args.model.lower() not in SHAPES:
        check_place(args.model, "model")
    shape = find_shape(args.model)
    four_bit = args.four_bit or shape.stored == "4 bits"
    gradients = dict(keeps_gradients=args.accumulate, buckets=args.gpus > 1)
    training = Training(args.rank, not args.no_embeddings, four_bit, not args.logits, **gradients)
    budget, host = int(args.gpu_memory * ESTIMATED_FILLED), int(args.host_memory * HOST_FILLED)
    length = -(-args.context // args.gpus)
    for way in _ways(training, args.gpus):
        plan = best_estimate(shape, way, length, budget, host)
        if plan.fits:
            break
    print(plan)
    if four_bit and not args.four_bit:
        print("The base is stored in 4 bits, so it is counted as with --four-bit.")
    elif shape.stored and not four_bit:
        print(f"The base is stored by {shape.stored!r}, and its weights are counted in 16 bits, as dequantised.")
    if shape.states:
        print(f"{shape.states} of {shape.blocks} blocks hold a state or do not attend, and are counted as attention:")
        print("memory and time may be far off. fit_memory measures them.")
    if four_bit and (share := round(100 * shape.sixteen_bit_share)):
        others = "the experts" if shape.experts > 1 else "others"
        print(f"{share}% of the blocks' weights stay in 16 bits: bitsandbytes converts linear layers, not {others}")
    if args.gpus > 1:
        how = "weights whole on each GPU" if way.shards == 1 else "weights, gradients and optimiser shared by FSDP2"
        print(f"{args.gpus} GPUs share each row (peft_longlora.sequence); {how}")
    most = args.gpus * max(longest(shape, one, budget, host) for one in _ways(training, args.gpus))
    print(f"the longest row that fits: {max(most, args.context) if plan.fits else most} tokens")
    if not plan.fits:
        needed = f"{plan.peak / GIB:.1f} GiB of {budget / GIB:.1f}"
        print(f"A row of {args.context} tokens does not fit: {needed}, and {plan.host / GIB:.1f} GiB of the host's")
        print(f"{host / GIB:.1f}, with all means. {_advice(shape, training, args, budget, host)}")
        return 1
    _print_time(shape, plan, args, group, four_bit)
    return 0


def _ways(training: Training, gpus: int) -> list[Training]:
    """Weights whole on each GPU, then shared by them."""
    return [replace(training, shards=shards) for shards in sorted({1, gpus})]


def _advice(shape: Shape, training: Training, args: argparse.Namespace, budget: int, host: int) -> str:
    """What would make the row fit, each by itself."""
    from peft_longlora.memory.estimate import best_estimate

    others = {
        "with --four-bit": (replace(training, four_bit=True), args.gpus, host),
        "with --no-embeddings": (replace(training, embeddings=False), args.gpus, host),
        "without --accumulate": (replace(training, keeps_gradients=False), args.gpus, host),
        "without --logits": (replace(training, fused_loss=True), args.gpus, host),
        "with twice the host's memory": (training, args.gpus, 2 * host),
    }
    others |= {f"with --gpus {n}": (replace(training, buckets=True), n, host) for n in (8, 4, 2) if n > args.gpus}
    found = [
        name
        for name, (how, gpus, room) in others.items()
        if any(best_estimate(shape, way, -(-args.context // gpus), budget, room).fits for way in _ways(how, gpus))
    ]
    several = [name for name in found if name.startswith("with --gpus")]
    found = [name for name in found if name not in several[:-1]]
    return f"It fits {', or '.join(found)}." if found else "It fits with none of the other options alone."


def _print_time(shape: Shape, plan: MemoryPlan, args: argparse.Namespace, group: int, four_bit: bool) -> None:
    """The seconds of a step, and the hours and the cost of all tokens."""
    from peft_longlora.memory.rates import seconds, unlike_measured

    if args.tokens_per_second:
        step, source = plan.length / args.tokens_per_second, "your own rate"
    else:
        step = seconds(shape, plan, group, args.gpu, four_bit)
        source = f"an estimate from measured steps on one {args.gpu}"
    hours = args.tokens / args.context * step / 3600
    rate = args.context / step
    print(f"{step:.1f} s a step, {rate:,.0f} tokens/s in all ({source}; groups of {group} tokens)")
    cost = f", which cost {hours * args.gpus * args.price_per_hour:,.2f}" if args.price_per_hour else ""
    print(f"{args.tokens:,} tokens: {hours:,.1f} hours{cost}")
    if not args.tokens_per_second and (unlike := unlike_measured(shape, plan.length, group, args.gpu, four_bit)):
        print(f"No measured step is like this one: it has {'; '.join(unlike)}. Time and cost may be far off: measure a")
        print("few steps, and give --tokens-per-second.")


COMMAND = Command(
    "plan",
    "what a training step needs on a GPU, and how long it takes",
    add_options,
    run,
    description="Estimate the memory of a LoRA training step from the shape of the model, choose what makes it fit, "
    "and estimate time and cost. No GPU is needed. Ends with code 1 if the row does not fit.",
    epilog="On the GPU, peft_longlora.memory.fit_memory measures what this command estimates, and switches it on.",
    options={"model_type": "model"},
)

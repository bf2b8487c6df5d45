"""Training steps on sequences that GPUs share: S2-Attn with a halo, beside ring attention and Ulysses.

One optimiser step (forward, backward with gradient checkpointing, AdamW) of a real shape with random weights in bf16,
LoRA r=8 on q, k, v, o, loss in chunks of tokens, G = 8192. All rows are the same model and the same loop; only the
attention differs:

    alone     each GPU has its own sequence, at the same time: the rate of one GPU with as many tokens
    s2        the GPUs share one sequence (peft_longlora.sequence)
    ulysses   they share it, dense attention, heads and tokens exchanged through DTensor (peft_longlora.ulysses)
    ring      they share it, dense attention, torch.distributed.tensor.experimental.context_parallel

    torchrun --nproc-per-node 2 benchmarks/scaling.py --check --output scaling.json
    torchrun --nproc-per-node 2 benchmarks/scaling.py --rows s2:1048576 --block 4 --tile 16384 --output longest.json
    torchrun --nproc-per-node 8 benchmarks/scaling.py --shape llama-3.3-70b --sharded --check \
        --rows s2:1048576:0 --block 4 --tile 16384 --output 70b.json

Rows that are given more than once are taken together: alternate what is compared, because GPUs at their power limit
slow down as they warm up. NCCL_P2P_DISABLE=1 in the environment sends everything through the host's memory and not
over NVLink (docs/scaling.md says why that can be faster).

Weights are copied to each GPU. With --sharded FSDP2 cuts the weights of each layer into one part a GPU, and gathers
them when the layer runs. That is for shapes that one GPU cannot hold, such as llama-3.3-70b.

--block 4 checkpoints every 4 layers and inside them every layer, --offload keeps what goes into these blocks (without
--block: into layers) in the CPU's memory, --tile 16384 norms and MLPs in tiles: less memory for more time. A row that
needs more memory than there is ends the run; the file is written after every row.

Hardware: 2 GPUs with 140 GB (measured on two H200s: 2 minutes each). On CPUs: add --tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import transformers
from options import Parser, count, new_file, positive
from scaling_check import check
from scaling_memory import Saving
from scaling_step import batch_of, step
from scaling_traffic import Traffic
from scaling_weights import make_model, share_held
from shapes import SHAPES
from torch.distributed.device_mesh import init_device_mesh
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peft_longlora.sequence import parallelize_sequence

ATTENTIONS = ("alone", "s2", "ulysses", "ring")
ROWS = (
    "alone:32768:3 s2:32768:3 ulysses:32768:2 ring:32768:2 alone:32768:3 s2:32768:3 "
    "alone:65536 s2:65536 ulysses:65536 ring:65536"
)

# Without a mask function of that name transformers makes no mask: causality is all there is here.
AttentionInterface.register("causal_attention", sdpa_attention_forward)


def measure(model, optimizer, attention: str, tokens: int, repeats: int, mesh, device: torch.device) -> dict:
    """Seconds of a step, peak memory, bytes exchanged; the first step is not counted if there is another."""
    base = model.model.get_base_model()
    base.set_attn_implementation("causal_attention" if attention == "ring" else "s2_attn")
    if attention != "ring":
        parallelize_sequence(model.model, None if attention == "alone" else mesh)
    batch = batch_of(attention, tokens, base.config.vocab_size, mesh, device)
    labels = tokens - 1 if attention != "alone" else tokens // mesh.size() - 1
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, traffic = [], Traffic(mesh.size())
    for index in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        with traffic if index == 0 else nullcontext():
            loss = step(model, optimizer, attention, batch, labels, mesh)
        if attention != "alone":
            dist.all_reduce(loss)
        loss = loss.item()
        seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[1:] or seconds)
    median = seconds[(len(seconds) - 1) // 2]
    per_gpu = tokens // mesh.size()
    most = torch.tensor(
        [traffic.sent, traffic.gathered, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss],
        device=device,
        dtype=torch.float64,
    )
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    sent, gathered, host = most.tolist()
    return dict(
        attention=attention,
        gpus=1 if attention == "alone" else mesh.size(),
        tokens=per_gpu if attention == "alone" else tokens,
        seconds=median,
        is_warm=repeats > 0,
        tokens_per_second_per_gpu=per_gpu / median,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
        host_gib=host / 2**20,  # of one process, so far
        mib_sent_a_layer=sent / base.config.num_hidden_layers / 2**20,
        gib_gathered=gathered / 2**30,
        loss=loss,
    )


def row(text: str) -> tuple[str, int, int]:
    """Attention, tokens in all, and timed repeats."""
    attention, *parts = text.split(":")
    if attention not in ATTENTIONS or len(parts) not in (1, 2) or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not attention:tokens or attention:tokens:repeats, with {', '.join(ATTENTIONS)}"
        )
    return attention, int(parts[0]), int(parts[1]) if len(parts) == 2 else 1


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--rows",
        nargs="*",
        type=row,
        default=[row(each) for each in ROWS.split()],
        help="attention:tokens in all[:timed repeats]",
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--sharded", action="store_true", help="weights sharded over the GPUs with FSDP2")
    parser.add_argument("--group-size", type=positive, default=8192)
    parser.add_argument("--block", type=count, default=0, help="layers a checkpoint, with checkpoints inside")
    parser.add_argument("--tile", type=count, default=0, help="tokens of norms and MLPs at a time")
    parser.add_argument("--offload", action="store_true", help="what goes into blocks waits in the CPU's memory")
    parser.add_argument("--layers", type=positive, help="fewer layers than the shape's, to try it out")
    parser.add_argument("--tiny", action="store_true", help="a toy shape on the CPU, to see that it runs")
    parser.add_argument("--check", action="store_true", help="compare loss and gradients at the end")
    parser.add_argument("--output", type=new_file, required=True, help="write the numbers here as JSON")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, one process a GPU: torchrun --nproc-per-node 2 benchmarks/scaling.py ...")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here. --tiny runs a toy shape on the CPU")
    device = torch.device("cpu" if args.tiny else f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if args.tiny else "nccl")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    name = "tiny" if args.tiny else args.shape
    shape = SHAPES[name]
    shape = {**shape, "num_hidden_layers": args.layers or shape["num_hidden_layers"]}
    about = dict(
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        gpus=dist.get_world_size(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        name=name,
        shape=shape,
        sharded=args.sharded,
        group_size=args.group_size,
        block=args.block,
        tile=args.tile,
        offload=args.offload,
        environment={name: value for name, value in os.environ.items() if name.startswith("NCCL_P2P")},
        command="torchrun benchmarks/scaling.py " + shlex.join(sys.argv[1:]),
    )
    results = dict(about=about, rows=[])

    def report(row: dict) -> None:
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
            with open(args.output, "w") as file:
                json.dump(results, file, indent=1)

    saving = Saving(args.block, args.tile, args.offload)
    model = make_model(shape, args.group_size, device, saving, mesh=mesh if args.sharded else None)
    about["share_of_weights"] = share_held(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for attention, tokens, repeats in args.rows:
        results["rows"].append(measure(model, optimizer, attention, tokens, repeats, mesh, device))
        report(results["rows"][-1])
    if args.check:
        results["check"] = check(mesh, device, saving, args.sharded)
        report(results["check"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

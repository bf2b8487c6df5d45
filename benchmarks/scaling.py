"""Training steps on sequences that GPUs share: S2-Attn with a halo, beside ring attention and Ulysses.

One optimiser step (forward, backward with gradient checkpointing, AdamW) of a Llama-3.1-8B shape with random weights in
bf16, all 32 layers, LoRA r=8 on q, k, v, o, weights copied to each GPU, loss in chunks of tokens, G = 8192. All rows
are the same model and the same loop; only the attention differs:

    alone     each GPU has its own sequence, at the same time: the rate of one GPU with as many tokens
    s2        the GPUs share one sequence (peft_longlora.sequence)
    ulysses   they share it, dense attention, heads and tokens exchanged through DTensor (peft_longlora.ulysses)
    ring      they share it, dense attention, torch.distributed.tensor.experimental.context_parallel

    torchrun --nproc-per-node 2 benchmarks/scaling.py --check --output scaling.json
    torchrun --nproc-per-node 2 benchmarks/scaling.py --rows s2:1048576 --block 4 --tile 16384 --output longest.json

Rows that are given more than once are taken together: alternate what is compared, because GPUs at their power limit
slow down as they warm up. NCCL_P2P_DISABLE=1 in the environment sends everything through the host's memory and not
over NVLink (docs/scaling.md says why that can be faster).

--block 4 checkpoints every 4 layers and inside them every layer, --offload keeps what goes into these blocks in the
CPU's memory, --tile 16384 norms and MLPs in tiles: less memory for more time. A row that needs more memory than there
is ends the run; the file is written after every row.

Hardware: 2 GPUs with 140 GB (measured on two H200s: 2 minutes each). On CPUs: add --tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from options import Parser, count, new_file, positive
from peft import get_peft_model
from shapes import LLAMA_3_8B, TINY
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peft_longlora import LongLoraConfig, use_attention
from peft_longlora.sequence import parallelize_sequence, shard_batch

ATTENTIONS = ("alone", "s2", "ulysses", "ring")
ROWS = (
    "alone:32768:3 s2:32768:3 ulysses:32768:2 ring:32768:2 alone:32768:3 s2:32768:3 "
    "alone:65536 s2:65536 ulysses:65536 ring:65536"
)
CHUNK = 8192  # tokens of the loss at a time

# Without a mask function of that name transformers makes no mask: causality is all there is here.
AttentionInterface.register("causal_attention", sdpa_attention_forward)


class Block(nn.Module):
    """Several layers that are recomputed together in the backward, before each is by itself.

    What goes into a block, (1, S, hidden size), is kept until then: on the GPU, or in the CPU's memory.
    """

    def __init__(self, layers: list[nn.Module], is_offloaded: bool):
        super().__init__()
        self.layers, self.is_offloaded = nn.ModuleList(layers), is_offloaded

    def forward(self, hidden, **kwargs):
        def run(hidden):
            for layer in self.layers:
                hidden = layer(hidden, **kwargs)
            return hidden

        with save_on_cpu(pin_memory=hidden.is_cuda) if self.is_offloaded else nullcontext():
            return checkpoint(run, hidden, use_reentrant=False)


class Tiled(nn.Module):
    """A norm or an MLP that holds the intermediate values of some tokens at a time."""

    def __init__(self, inner: nn.Module, tokens: int):
        super().__init__()
        self.inner, self.tokens = inner, tokens

    def forward(self, hidden):
        parts = hidden.split(self.tokens, dim=1)
        return torch.cat([checkpoint(self.inner, part, use_reentrant=False) for part in parts], dim=1)


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends to others in the collectives of attention."""

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.bytes = ranks, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(x, DTensor) for x in types):
            return NotImplemented  # seen when it comes apart into what it exchanges and computes
        name = function.name()
        if "alltoall_base_" in name:  # the halo's: output, input, and nothing to oneself
            self.bytes += args[1].numel() * args[1].element_size()
        elif name.startswith("_c10d_functional::all_to_all_single"):  # torch's ring, where it rotates
            parts = [x for rank, x in enumerate(args[2]) if rank != dist.get_rank()]
            self.bytes += args[0].numel() // args[0].shape[0] * sum(parts) * args[0].element_size()
        elif "shard_dim_alltoall" in name or "all_gather_into_tensor" in name:
            size = args[0].numel() * args[0].element_size()
            self.bytes += size * (self.ranks - 1) if "all_gather" in name else size * (self.ranks - 1) // self.ranks
        return function(*args, **(kwargs or {}))


def make_model(
    shape: dict, group_size: int, device: torch.device, block: int = 0, tile: int = 0, is_offloaded: bool = False
) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    config = LongLoraConfig(
        context_length=2**21, rope_type="linear", group_size=group_size, train_embeddings=False, train_norms=False
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    backbone = model.get_base_model().model
    if tile:
        for layer in backbone.layers:
            for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
                setattr(layer, name, Tiled(getattr(layer, name), tile))
    if block:
        layers = list(backbone.layers)
        backbone.layers = nn.ModuleList(
            Block(layers[i : i + block], is_offloaded) for i in range(0, len(layers), block)
        )
    return model


def loss_of(model: nn.Module, batch: dict, labels: int) -> torch.Tensor:
    """The sum of this rank's losses over the number of all labels; logits for some tokens at a time."""
    head = model.get_base_model().lm_head
    embeddings = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()  # or checkpoints have no gradient
    hidden = model.get_base_model().model(
        inputs_embeds=embeddings, position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state[0]  # fmt: skip

    def part(hidden, targets):
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")

    parts = zip(hidden.split(CHUNK), batch["shift_labels"][0].split(CHUNK), strict=True)
    return sum(checkpoint(part, *one, use_reentrant=False) for one in parts) / labels


def batch_of(attention: str, tokens: int, vocabulary: int, mesh, device: torch.device) -> dict:
    """This rank's part of one row of `tokens` tokens; alone, a row of its own of as many as its part would be."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    tokens = tokens // ranks if attention == "alone" else tokens
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    batch = shard_batch(dict(input_ids=ids, labels=ids), *((0, 1) if attention in ("alone", "ring") else (rank, ranks)))
    return {name: x.to(device) for name, x in batch.items()}


def step(model, optimizer, attention: str, batch: dict, labels: int, mesh) -> float:
    names = ("input_ids", "position_ids", "shift_labels")
    around = nullcontext()
    if attention == "ring":
        from torch.distributed.tensor.experimental import context_parallel

        batch = {name: batch[name].clone() for name in names}
        around = context_parallel(mesh, buffers=[batch[name] for name in names], buffer_seq_dims=[1, 1, 1])
    with around, use_attention(model, "dense") if attention == "ulysses" else nullcontext():
        loss = loss_of(model, batch, labels)
        loss.backward()
    for parameter in optimizer.param_groups[0]["params"]:
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def measure(model, optimizer, attention: str, tokens: int, repeats: int, mesh, device: torch.device) -> dict:
    """Seconds of a step, peak memory, bytes sent; the first step is not counted if there is another."""
    shape = model.get_base_model().config
    model.get_base_model().set_attn_implementation("causal_attention" if attention == "ring" else "s2_attn")
    if attention != "ring":
        parallelize_sequence(model, None if attention == "alone" else mesh)
    batch = batch_of(attention, tokens, shape.vocab_size, mesh, device)
    labels = tokens - 1 if attention != "alone" else tokens // mesh.size() - 1
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, sent = [], Sent(mesh.size())
    for index in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        with sent if index == 0 else nullcontext():
            loss = step(model, optimizer, attention, batch, labels, mesh)
        if attention != "alone":
            dist.all_reduce(loss)
        loss = loss.item()
        seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[1:] or seconds)
    median = seconds[(len(seconds) - 1) // 2]
    per_gpu = tokens // mesh.size()
    bytes_sent = torch.tensor(float(sent.bytes), device=device)
    dist.all_reduce(bytes_sent, op=dist.ReduceOp.MAX)
    return dict(
        attention=attention,
        gpus=1 if attention == "alone" else mesh.size(),
        tokens=per_gpu if attention == "alone" else tokens,
        seconds=median,
        is_warm=repeats > 0,
        tokens_per_second_per_gpu=per_gpu / median,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
        mib_sent_a_layer=bytes_sent.item() / shape.num_hidden_layers / 2**20,
        loss=loss,
    )


def check(mesh, device: torch.device) -> dict:
    """Loss and gradients of four layers in bf16: shared, and alone, against alone in float32."""
    shape = {**LLAMA_3_8B, "num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 512}
    shape.update(num_attention_heads=8, num_key_value_heads=2)
    if device.type == "cpu":
        shape = TINY
    tokens, found = (16384 if device.type == "cuda" else 1024) - 7, {}
    for name in ("float32", "alone", "shared"):
        model = make_model(shape, tokens // 16 * 2, device)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.05)
        model.to(torch.float32 if name == "float32" else torch.bfloat16)
        parallelize_sequence(model, mesh if name == "shared" else None)
        ids = torch.randint(shape["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
        where = (mesh.get_local_rank(), mesh.size()) if name == "shared" else (0, 1)
        batch = {k: v.to(device) for k, v in shard_batch(dict(input_ids=ids, labels=ids), *where).items()}
        loss = loss_of(model, batch, tokens - 1)
        loss.backward()
        values = torch.cat(
            [loss.detach().float()[None], *(p.grad.float().flatten() for p in model.parameters() if p.requires_grad)]
        )
        if name == "shared":
            dist.all_reduce(values)
        found[name] = values
    truth = found.pop("float32")
    errors = {
        name: dict(loss=abs(x[0] - truth[0]).item(), gradients=((x - truth)[1:].norm() / truth[1:].norm()).item())
        for name, x in found.items()
    }
    difference = (found["shared"] - found["alone"])[1:].norm() / found["alone"][1:].norm()
    return dict(tokens=tokens, **errors, shared_to_alone=difference.item())


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
    parser.add_argument("--group-size", type=positive, default=8192)
    parser.add_argument("--block", type=count, default=0, help="layers a checkpoint, with checkpoints inside")
    parser.add_argument("--tile", type=count, default=0, help="tokens of norms and MLPs at a time")
    parser.add_argument("--offload", action="store_true", help="what goes into blocks waits in the CPU's memory")
    parser.add_argument("--layers", type=positive, help="fewer layers than 32, to try it out")
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
    shape = TINY if args.tiny else LLAMA_3_8B
    shape = {**shape, "num_hidden_layers": args.layers or shape["num_hidden_layers"]}
    about = dict(
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        gpus=dist.get_world_size(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        shape=shape,
        group_size=args.group_size,
        block=args.block,
        tile=args.tile,
        offload=args.offload,
        environment={name: value for name, value in os.environ.items() if name.startswith("NCCL_P2P")},
        command="torchrun benchmarks/scaling.py " + " ".join(sys.argv[1:]),
    )
    results = dict(about=about, rows=[])

    def report(row: dict) -> None:
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
            with open(args.output, "w") as file:
                json.dump(results, file, indent=1)

    model = make_model(shape, args.group_size, device, args.block, args.tile, args.offload)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for attention, tokens, repeats in args.rows:
        results["rows"].append(measure(model, optimizer, attention, tokens, repeats, mesh, device))
        report(results["rows"][-1])
    if args.check:
        results["check"] = check(mesh, device)
        report(results["check"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Loss and gradients of `scaling.py`'s shared step, against one process that has the whole sequence and all weights."""

from __future__ import annotations

import torch
import torch.distributed as dist
from scaling_memory import PLAIN, Saving
from scaling_step import NAMES, backward
from scaling_weights import make_model
from shapes import LLAMA_3_8B, TINY
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from peft_longlora.sequence import parallelize_sequence, shard_batch

SMALL = dict(
    LLAMA_3_8B,
    num_hidden_layers=4,
    hidden_size=1024,
    intermediate_size=2048,
    vocab_size=512,
    num_attention_heads=8,
    num_key_value_heads=2,
)


def values_of(
    mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, saving: Saving, *, is_shared: bool, is_sharded: bool
) -> torch.Tensor:
    """The loss and all gradients of four layers, one after the other, in float32.

    Args:
        is_shared: whether the ranks share the sequence. is_sharded: whether they share the weights too.
    """
    shape, tokens = (SMALL, 16384 - 7) if device.type == "cuda" else (TINY, 1024 - 7)
    model = make_model(
        shape, tokens // 16 * 2, device, saving, mesh=mesh if is_sharded else None, dtype=dtype, lora_b=0.05
    )
    parallelize_sequence(model.model, mesh if is_shared else None)
    ids = torch.randint(shape["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    where = (mesh.get_local_rank(), mesh.size()) if is_shared else (0, 1)
    batch = shard_batch(dict(input_ids=ids, labels=ids), *where)
    loss = model(**{name: batch[name].to(device) for name in NAMES}, labels=tokens - 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if is_shared:
        backward(loss, parameters, mesh.size())
    else:
        loss.backward()
    loss = loss.detach().float()
    if is_shared:
        dist.all_reduce(loss)
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    return torch.cat([loss[None], *(grad.float().flatten() for grad in grads)])


def check(mesh: DeviceMesh, device: torch.device, saving: Saving, is_sharded: bool) -> dict:
    """In bf16: shared, and alone, against alone in float32. On CPUs also shared in float32.

    Returns: for each the error of the loss, and of all gradients together relative to their norm; `shared_to_alone` is
        the difference of the gradients in bf16.
    """

    def values(dtype: torch.dtype, is_shared: bool) -> torch.Tensor:
        if is_shared:
            return values_of(mesh, device, dtype, saving, is_shared=True, is_sharded=is_sharded)
        return values_of(mesh, device, dtype, PLAIN, is_shared=False, is_sharded=False)

    def difference(one: torch.Tensor, other: torch.Tensor) -> float:
        return ((one - other)[1:].norm() / other[1:].norm()).item()

    truth = values(torch.float32, False)
    found = dict(alone=values(torch.bfloat16, False), shared=values(torch.bfloat16, True))
    if device.type == "cpu":  # where kernels of float32 can be merged with the halo's
        found["shared_float32"] = values(torch.float32, True)
    return dict(
        sharded=is_sharded,
        **{name: dict(loss=abs(x[0] - truth[0]).item(), gradients=difference(x, truth)) for name, x in found.items()},
        shared_to_alone=difference(found["shared"], found["alone"]),
    )

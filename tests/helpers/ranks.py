"""Several processes on gloo, as torchrun would start them: imports are done once, so a rank starts in milliseconds."""

import os
import socket
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

_SECONDS = 150
# Imported once for all ranks, if the tests that ask have imported them.
_HEAVY = (
    "datasets",
    "peft_longlora",
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
)


def run_ranks(ranks: int, function, *args) -> list:
    """What `function(*args)` returns on each of `ranks` processes; its error, if one has any."""
    get_context("forkserver").set_forkserver_preload([name for name in _HEAVY if name in sys.modules])
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        arguments = (ranks, port, folder, function, args)
        running = multiprocessing.start_processes(_run, arguments, ranks, join=False, start_method="forkserver")
        end = time.monotonic() + _SECONDS
        while not running.join(timeout=1):
            if time.monotonic() > end:
                for process in running.processes:
                    process.kill()
                pytest.fail(f"{ranks} ranks did not finish within {_SECONDS} seconds")
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(ranks)]


def _run(rank: int, ranks: int, port: int, folder: str, function, args) -> None:
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    if ranks > 1:
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    torch.save(function(*args), Path(folder, str(rank)))
    if ranks > 1:
        dist.barrier()  # nobody leaves while another still needs its connections
        dist.destroy_process_group()


class Traffic(TorchDispatchMode):
    """Bytes that this rank hands to all-to-alls, one number a call."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d.alltoall_base_.default:
            self.sent.append(args[1].numel() * args[1].element_size())
        return function(*args, **(kwargs or {}))

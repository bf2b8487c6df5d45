"""Run a script as one of several CPU processes, where `accelerate launch` wants GPUs for its configuration.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml tests/helpers/on_cpu.py SCRIPT ARGUMENTS ...

accelerate averages gradients (DDP) on CPUs as well, but shards models (FSDP, DeepSpeed) on accelerators only. Here it
is told that there are several devices, reached through gloo, which compute in bfloat16; the rest goes as on GPUs.
"""

import contextlib
import os
import runpy
import sys
from unittest import mock

import torch
from accelerate.state import DistributedType, PartialState
from transformers import TrainingArguments

if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    answers = [mock.patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)]
    if any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")):
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        found = ("gloo", DistributedType.MULTI_GPU)
        # "Offloaded" weights are pinned for the copy to a device, of which there is none.
        answers.append(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *_, **__: tensor))
        answers.append(mock.patch.object(PartialState, "_prepare_backend", lambda *_, **__: found))
        begin = TrainingArguments.__post_init__

        def find_devices(arguments: TrainingArguments) -> None:  # scripts that found none ask for the CPU
            arguments.use_cpu = False
            begin(arguments)

        answers.append(mock.patch.object(TrainingArguments, "__post_init__", find_devices))
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    with contextlib.ExitStack() as stack:
        for answer in answers:
            stack.enter_context(answer)
        runpy.run_path(sys.argv[0], run_name="__main__")

"""Run by test_data_parallel.py, in as many processes as `accelerate launch` starts: train, save, resume, fail.

    accelerate launch --config_file ... tests/helpers/on_cpu.py tests/helpers/data_parallel.py RUNS.json

RUNS.json is a list of dicts, the arguments of `train`. One process alone does the same by calling `train`.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from peft_longlora import LongLoraConfig
from peft_longlora.sequence.trainer import SequenceParallelMixin

ROWS = torch.randint(3, 97, (16, 96), generator=torch.Generator().manual_seed(11)).tolist()


class SharingTrainer(SequenceParallelMixin, Trainer):
    """Whose processes share each row."""


class Fault(TrainerCallback):
    """After an optimiser step, in one process: "kill" it, let it "sleep" (seconds), or "fill" its disk (bytes)."""

    def __init__(self, kind: str, rank: int, step: int, amount: float = 0):
        self.kind, self.rank, self.step, self.amount = kind, rank, step, amount

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step or args.process_index != self.rank:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "sleep":
            time.sleep(self.amount)
        elif (
            self.kind == "fill"
        ):  # no file grows beyond this: what the writer is told differs in the error's number only
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.amount), resource.RLIM_INFINITY))


def train(
    base: str,
    output: str,
    *,
    batch_size: int,
    steps: int = 4,
    save_steps: int = 2,
    resume: str | None = None,
    dtype: str = "float32",
    is_four_bit: bool = False,
    dropout: float = 0.0,
    fault: dict | None = None,
    save_by_hand: bool = False,
    is_shared: bool = False,
    dense_every: int | None = None,
    **changes,
) -> Trainer:
    """Some steps with plain Trainer; leaves checkpoints, an adapter and losses.json in `output`."""
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=output, per_device_train_batch_size=batch_size, max_steps=steps, save_steps=save_steps,
        learning_rate=5e-3, weight_decay=0.0, logging_steps=1, report_to="none", disable_tqdm=True, seed=0,
        dataloader_pin_memory=False, lr_scheduler_type="constant", **changes,
    )  # fmt: skip
    dtype, quantised = getattr(torch, dtype), {}
    if is_four_bit:
        types = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype)
        quantised["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **types)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="s2_attn", **quantised)
    config = LongLoraConfig(
        r=4, context_length=128, group_size=16, lora_dropout=dropout, task_type="CAUSAL_LM", dense_every=dense_every
    )
    model = get_peft_model(model, config)
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    callbacks = [Fault(**fault)] if fault else None
    kind = SharingTrainer if is_shared else Trainer
    trainer = kind(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    if save_by_hand:
        trainer.model.save_pretrained(output)
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(output, "losses.json").write_text(json.dumps(losses))
    return trainer


if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text()):
        train(**run)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()

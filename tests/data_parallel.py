"""Run by test_data_parallel.py, in as many processes as `accelerate launch` starts: train, save, resume.

    accelerate launch --config_file ... tests/on_cpu.py tests/data_parallel.py RUNS.json

RUNS.json is a list of dicts, the arguments of `train`. One process alone does the same by calling `train`.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from peft_longlora import LongLoraConfig

ROWS = torch.randint(3, 97, (16, 96), generator=torch.Generator().manual_seed(11)).tolist()


def train(
    base: str,
    output: str,
    *,
    batch_size: int,
    steps: int = 4,
    save_steps: int = 2,
    resume: str | None = None,
    dtype: str = "float32",
    bf16: bool = False,
    dropout: float = 0.0,
    arguments_first: bool = True,
    four_bit: bool = False,
    **changes,
) -> Trainer:
    """Some steps with plain Trainer; leaves checkpoints, an adapter and losses.json in `output`."""

    def make_arguments():
        return TrainingArguments(
            output_dir=output, per_device_train_batch_size=batch_size, max_steps=steps, save_steps=save_steps,
            learning_rate=5e-3, weight_decay=0.0, logging_steps=1, report_to="none", disable_tqdm=True, seed=0, bf16=bf16,
            dataloader_pin_memory=False, lr_scheduler_type="constant", **changes,
        )  # fmt: skip

    torch.manual_seed(0)
    arguments = make_arguments() if arguments_first else None
    quantization = None
    if four_bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=getattr(torch, dtype), attn_implementation="s2_attn", quantization_config=quantization
    )
    config = LongLoraConfig(r=4, context_length=128, group_size=16, lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    data = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})
    trainer = Trainer(model, arguments or make_arguments(), train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
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

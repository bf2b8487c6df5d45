"""The end of a run that several processes share."""

import weakref

import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peft_longlora import LongLoraConfig
from peft_longlora.training import leave
from tests.helpers.configs import tiny_llama_config
from tests.helpers.ranks import run_ranks


def train(folder: str) -> list[bool]:
    """What is true when the group of processes is about to end."""
    base = LlamaForCausalLM(tiny_llama_config(max_position_embeddings=64))
    model = get_peft_model(base, LongLoraConfig(r=4, group_size=16))
    rows = [dict(input_ids=torch.arange(32), labels=torch.arange(32))] * 4
    options = dict(max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    trainer = Trainer(model, TrainingArguments(folder, per_device_train_batch_size=1, **options), train_dataset=rows)
    trainer.train()
    wrapped, found = weakref.ref(trainer.model_wrapped), [trainer.model_wrapped is not model]
    trainer.accelerator.end_training = lambda: found.append(wrapped() is None)
    leave(trainer)
    return found


def test_ddp_is_gone_before_the_group_of_its_processes(tmp_path):
    """Otherwise gloo's thread and DDP's end may wait for each other for ever."""
    assert run_ranks(2, train, str(tmp_path)) == [[True, True]] * 2

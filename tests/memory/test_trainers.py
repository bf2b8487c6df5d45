"""Trainer and SFTTrainer with all means together, and a 4-bit base: the losses of plain training."""

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_longlora.memory import checkpoint_blocks
from tests.helpers.tiny import IDS, extend, make
from tests.memory.test_steps import ALL
from tests.sequence.test_trainer import fast_tokenizer

GENERATOR = torch.Generator().manual_seed(7)
ROWS = [torch.randint(3, 97, (80 + 9 * i,), generator=GENERATOR).tolist() for i in range(4)]


def losses(kind: str, folder, options: dict | None) -> list[float]:
    model = extend(make(num_hidden_layers=3), group_size=16)
    if options:
        checkpoint_blocks(model, **options)
    common = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1,
        gradient_checkpointing=False, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": ROWS, "labels": ROWS})
    if kind == "SFTTrainer":
        args = SFTConfig(**common, max_length=128, packing=True)
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=fast_tokenizer())
    else:
        collator = DataCollatorForSeq2Seq(fast_tokenizer())
        trainer = Trainer(model, TrainingArguments(**common), train_dataset=data, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_losses_are_those_of_plain_training(kind, tmp_path):
    plain, together = (losses(kind, tmp_path, options) for options in (None, ALL))
    assert len(plain) == 2 and plain == pytest.approx(together, rel=1e-5)


def test_a_4_bit_base():
    """The same loss and gradients as when every block keeps everything."""
    pytest.importorskip("bitsandbytes")
    model = four_bit(make(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, num_hidden_layers=3))
    model = extend(model, group_size=16).train()
    found = []
    for options in (dict(free=3), ALL):
        checkpoint_blocks(model, **options)
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        found.append((loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (again, others) = found
    assert torch.equal(loss, again) and grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, msg=name)


def four_bit(model):
    """Projections of the blocks in NF4, as transformers loads them."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in [*model.model.layers.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child) is torch.nn.Linear:
                small = Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16)
                small.weight = Params4bit(child.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
                setattr(parent, name, small)
    model.is_loaded_in_4bit = True
    return model

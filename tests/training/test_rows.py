"""Packed rows of `load_rows` in a plain Trainer: every document is trained on as if it were alone."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_longlora import LongLoraConfig
from peft_longlora.data import load_rows
from tests.helpers.tiny_base import prose, save_base

WORDS = (150, 10, 25, 40)  # with the window of 128: one full row, and the ends of four documents


@pytest.mark.parametrize("has_tokenizer", [False, True], ids=["plain", "with-tokenizer"])
def test_the_loss_is_that_of_each_document_alone(tmp_path, has_tokenizer):
    base = save_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    (tmp_path / "books").mkdir()
    for number, words in enumerate(WORDS):
        (tmp_path / "books" / f"{number}.txt").write_text(prose(words, number))
    rows = load_rows(tmp_path / "books", tokenizer, 128, pack=True, cache=tmp_path / "cache")
    documents = [[*tokenizer(prose(words, n))["input_ids"], tokenizer.eos_token_id] for n, words in enumerate(WORDS)]
    pieces = [ids[i : i + 128] for ids in documents for i in range(0, len(ids), 128)]
    assert len(rows) < len(pieces)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="s2_attn")
    model = get_peft_model(model, LongLoraConfig(r=4, context_length=128, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        tmp_path / "out", per_device_train_batch_size=1, gradient_accumulation_steps=len(rows), max_steps=1,
        logging_steps=1, learning_rate=0.0, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer if has_tokenizer else None)
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model.train()
    total = count = 0
    for ids in map(torch.tensor, pieces):
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        count += len(ids) - 1
    assert loss == pytest.approx(total / count, rel=1e-4)

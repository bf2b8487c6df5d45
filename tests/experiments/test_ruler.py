"""RULER in a study: answers written together are those written alone, scores are the readers', a cell has them."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peft_longlora import LongLoraConfig, use_attention
from peft_longlora.eval import Subject
from tests.helpers.answering_models import byte_tokenizer, count_words, read_chain, read_needles
from tests.helpers.configs import tiny_llama_config

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import ruler
import run
from books import Books
from cells import read_study

LENGTH = 3000  # tokens are characters
STUDY = """
title: a tiny study
window: 96
seeds: [0]
budgets: [tokens]
reference: full
config: {r: 4, lora_alpha: 8, context_length: 96, rope_type: yarn}
training: {steps: 1, learning_rate: 2.0e-2, embedding_learning_rate: 5.0e-3, warmup_steps: 0}
evaluation: {native_window: 96, edges: [0, 96], passkey_lengths: [3000], passkeys: 1, ruler: 1}
cells:
  - {name: full, config: {attention_pattern: full}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base model whose tokens are bytes, and books of made-up sentences as tokens."""
    folder, rng = tmp_path_factory.mktemp("study"), random.Random(0)
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(eos_token="~")
    config = tiny_llama_config(vocab_size=256, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    words = ["".join(rng.choices("bcdfglmnprst", k=2) + rng.choices("aeiou", k=2) + ["s"]) for _ in range(900)]
    for split, lengths in (("train", (900, 900)), ("validation", (800, 800))):
        books = [" ".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(length // 9)) for length in lengths]
        tokens = [tokenizer(book)["input_ids"] for book in books]
        np.save(folder / f"{split}.npy", np.concatenate(tokens).astype(np.uint16))
        np.save(folder / f"{split}_off.npy", np.cumsum([0, *map(len, tokens)]))
    return folder


@pytest.mark.parametrize("is_fastest", [True, False])
def test_answers_written_together_are_those_written_alone(place, is_fastest):
    """Rows of several lengths, one of which ends early by an end token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(place / "base", attn_implementation="s2_attn", dtype=torch.float32)
    model = get_peft_model(model, LongLoraConfig(r=4, context_length=96, group_size=16, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():  # so that answers depend on what was read
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model = model.merge_and_unload().eval()
    subject, rng = Subject.of(model, byte_tokenizer(eos_token="~")), random.Random(1)
    rows = [[rng.randrange(256) for _ in range(size)] for size in (70, 41, 96, 2, 70)]
    with use_attention(model, "dense", **({"dense_attention": "fastest"} if is_fastest else {})):
        free = model.generate(torch.tensor([rows[0]]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        model.generation_config.eos_token_id = free[0, 70 + 5].item()
        alone = [subject.answer(row, 12) for row in rows]
        assert len(set(alone[:4])) == 4 and alone[0] == alone[0][:6] != alone[2]
        assert ruler.write_answers(subject, rows, 12) == alone


def readers(prompt: str) -> str:
    """What a perfect reader of any of the tasks writes."""
    if "Memorize and track" in prompt:
        return read_chain(prompt)
    return count_words(prompt) if "numbered list" in prompt else read_needles(prompt)


@pytest.mark.parametrize(("reader", "share"), [(readers, 100), (lambda prompt: "", 0)])
def test_scores_are_the_shares_that_a_reader_finds(place, monkeypatch, reader, share):
    model = AutoModelForCausalLM.from_pretrained(place / "base", attn_implementation="s2_attn")
    tokenizer, seen = byte_tokenizer(eos_token="~"), []

    def write(subject, rows, most):
        seen.extend(len(row) + most for row in rows)
        return [reader(tokenizer.decode(row)) for row in rows]

    monkeypatch.setattr(ruler, "write_answers", write)
    found = ruler.measure_ruler(model, tokenizer, Books.read(place, "validation"), [LENGTH, 9000], 2)
    assert found == {task: {str(length): dict(score=share, of=2) for length in (LENGTH, 9000)} for task in ruler.TASKS}
    for number, tokens in enumerate(seen):
        length = (LENGTH, 9000)[number // 2 % 2]
        assert 0.97 * length <= tokens <= length


def test_a_cell_has_rulers_scores_and_other_cells_keep_their_fingerprints(place, monkeypatch):
    (place / "tiny.yaml").write_text(STUDY)
    (place / "without.yaml").write_text(STUDY.replace(", ruler: 1", ""))
    [cell], [other] = read_study(place / "tiny.yaml").cells, read_study(place / "without.yaml").cells
    assert "ruler" not in other.settings["evaluation"] and other.fingerprint != cell.fingerprint
    command = ["--model", str(place / "base"), "--tokens", str(place), "--device", "cpu", "--results", str(place)]
    monkeypatch.setattr(ruler, "TASKS", ("niah_multikey_1", "vt"))
    assert run.main([str(place / "tiny.yaml"), *command]) == 0
    metrics = json.loads((place / "tiny.jsonl").read_text())["metrics"]
    assert {task: set(each) for task, each in metrics["ruler"].items()} == {
        "niah_multikey_1": {"3000"},
        "vt": {"3000"},
    }
    assert all(
        0 <= one["score"] <= 100 and one["of"] == 1 for each in metrics["ruler"].values() for one in each.values()
    )
    assert metrics["passkey"]["3000"]["of"] == 1


def test_rulers_prompts_need_a_length(place, capsys):
    (place / "none.yaml").write_text(STUDY.replace("passkey_lengths: [3000]", "passkey_lengths: []"))
    with pytest.raises(SystemExit):
        run.main([str(place / "none.yaml"), "--model", str(place / "base"), "--tokens", str(place), "--device", "cpu"])
    assert "ruler needs passkey_lengths" in capsys.readouterr().err

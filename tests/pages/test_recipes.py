"""Every recipe: its keys are known, it says what it needs, and it runs a step on a tiny model of the same kind."""

import json
import re

import pytest
import torch
import yaml
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_longlora.training import read_recipe, train
from tests.helpers.paths import EMBEDDED, ROOT
from tests.helpers.tiny_base import prose

pytest.importorskip("trl")
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
WINDOW = 256  # of the tiny models' adapters; every other number of tokens shrinks by the same ratio
# The published config.json of each base: model_type, window, and what else is unusual about it.
LLAMA_3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
BASES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 8192, dict(tie_word_embeddings=True)),
    "meta-llama/Llama-2-7b-hf": ("llama", 4096, {}),
    "meta-llama/Llama-3.1-8B": ("llama", 131072, dict(rope_parameters=LLAMA_3)),
    "mistralai/Mistral-7B-v0.3": ("mistral", 32768, dict(sliding_window=None)),
    "Qwen/Qwen2.5-Coder-7B": ("qwen2", 32768, {}),
    "Qwen/Qwen3-8B": ("qwen3", 40960, {}),
    "Qwen/Qwen3-4B-Instruct-2507": ("qwen3", 262144, dict(tie_word_embeddings=True)),
    "Qwen/Qwen3.5-4B": ("qwen3_5_text", 262144, dict(linear_num_key_heads=2, linear_num_value_heads=2)),
}


def save_stand_in(folder, name: str, ratio: int):
    model_type, window, changes = BASES[name]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    if rope := changes.get("rope_parameters"):
        changes = {**changes, "rope_parameters": {**rope, "original_max_position_embeddings": 8192 // ratio}}
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=window // ratio,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
        **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_data(folder, kind: str):
    """A folder that serves as books and as a repository, or a file of records."""
    if kind == "records":
        path = folder / "records.jsonl"
        records = [{"instruction": "Sum up.", "input": prose(300, n), "output": prose(5, n)} for n in range(4)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path
    (folder / "texts").mkdir()
    for number in range(3):
        (folder / "texts" / f"{number}.txt").write_text(prose(400, number))
    return folder / "texts"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_one_step_on_a_tiny_model(path, tmp_path, capsys):
    given = yaml.safe_load(path.read_text())
    ratio = given["context_length"] // WINDOW
    save_stand_in(tmp_path / "base", given["model"], ratio)
    data = save_data(tmp_path, given.get("kind", "text"))
    changes = dict(
        model=str(tmp_path / "base"), data=str(data), context_length=WINDOW, max_steps=1, sequence_parallel=1,
        gradient_accumulation_steps=1, output_dir=str(tmp_path / "out"), eval_lengths=[WINDOW], report_to="none",
        save_strategy="no",
    )  # fmt: skip
    if "group_size" in given:
        changes["group_size"] = given["group_size"] // ratio
    if rope := given.get("rope_parameters"):
        original = rope["original_max_position_embeddings"] // ratio
        changes["rope_parameters"] = {**rope, "original_max_position_embeddings": original}
    if "eval_data" in given:
        (tmp_path / "held.txt").write_text(prose(400, 9))
        changes["eval_data"] = str(tmp_path / "held.txt")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**given, **changes}))

    assert train(read_recipe(tmp_path / "recipe.yaml")) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"'loss': ", said)) == 1
    config = PeftConfig.from_pretrained(tmp_path / "out")
    asked = {**given, **changes}
    for name in ("r", "lora_alpha", "attention_pattern", "dense_every", "train_embeddings", "rope_parameters"):
        if name in asked:
            assert getattr(config, name) == asked[name], name
    assert config.context_length == WINDOW
    grows = BASES[given["model"]][1] // ratio < WINDOW
    assert config.applied_context_length == (WINDOW if grows else BASES[given["model"]][1] // ratio)
    if "eval_data" in given:
        assert {row["length"] for row in json.loads((tmp_path / "out/results.json").read_text())["results"]} >= {WINDOW}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_as_it_stands_and_says_what_it_needs(path):
    recipe = read_recipe(path)
    assert recipe.run.about.keys() == {"hardware", "hours", "memory"}
    for name in ("hours", "memory"):
        assert re.match(r"(measured|computed|not known)\b", recipe.run.about[name]), name
    text = path.read_text()
    assert f"longlora train recipes/{path.name}" in text or f"peft_longlora train recipes/{path.name}" in text


def test_every_recipe_is_on_its_page():
    page = (ROOT / "docs/training.md").read_text()
    assert {path.name for path in RECIPES} == set(re.findall(r"recipes/([\w.-]+\.yaml)\)", page))

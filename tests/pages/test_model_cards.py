"""model_cards/: each card is what model_cards/make.py renders now, and its metadata and code are sound."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_longlora import LongLoraConfig
from peft_longlora.adapter.count import without_count
from peft_longlora.attention.settings import settings_on
from peft_longlora.hub.results import Results

FOLDER = Path(__file__).parents[2] / "model_cards"
sys.path.insert(0, str(FOLDER))
import trained  # noqa: E402
from make import CARDS, render  # noqa: E402

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
VERSIONS = re.compile(r"^- (PEFT|peft-longlora|transformers|torch) \S+$", re.MULTILINE)


@pytest.mark.parametrize("name", CARDS)
def test_card_is_what_its_config_renders(name):
    stored = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert VERSIONS.sub("", stored) == VERSIONS.sub("", render(name)), "run: python model_cards/make.py"


@pytest.mark.parametrize("name", CARDS)
def test_card_holds_together(name):
    text, card = (FOLDER / f"{name}.md").read_text(encoding="utf-8"), CARDS[name]
    parsed = ModelCard(text)
    assert parsed.data.base_model == card.base
    assert parsed.data.license == card.license
    assert {"peft", "longlora", "lora", f"base_model:adapter:{card.base}"} <= set(parsed.data.tags)
    assert parsed.data.eval_results is None and "None yet." in text, "a template must not show results"
    assert "A template: there are no weights behind this card" in text
    blocks = CODE.findall(parsed.text)
    assert blocks[0].startswith("import peft_longlora")
    for block in blocks:
        ast.parse(block)
    config = eval(blocks[-1], {"LongLoraConfig": LongLoraConfig})
    assert config.context_length == card.adapter["context_length"]
    before, after = card.config["max_position_embeddings"], card.adapter["context_length"]
    assert f"from {before:,} to **{after:,} tokens**" in text


def test_the_papers_card_states_the_papers_setting():
    """Position Interpolation by 32768 / 4096, r = 8, alpha = 16, groups of a quarter (arXiv:2309.12307)."""
    text = (FOLDER / "Llama-2-7b-longlora-32k.md").read_text(encoding="utf-8")
    assert '`{"factor": 8.0, "rope_theta": 10000.0, "rope_type": "linear"}`' in text
    assert "| LoRA | r = 8, alpha = 16, dropout = 0.0 |" in text
    assert "groups of 8,192 tokens, half the heads shifted by half a group" in text
    assert "| input embeddings | yes, 32,000 rows |\n| norms | yes |" in text


def test_readme_lists_every_card():
    files = {path.stem for path in FOLDER.glob("*.md")} - {"README"}
    links = set(re.findall(r"\]\(([^)/]+)\.md\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert files == links == set(CARDS)


TRAINED = FOLDER / trained.NAME


def test_the_trained_adapter_is_whole_and_small():
    """On a base of its shape with random weights: every tensor finds its place, and the model is another."""
    config = LongLoraConfig.from_pretrained(str(TRAINED))
    assert config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (TRAINED / "adapter_model.safetensors").stat().st_size < 10 * 10**6
    shape = dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    ids = torch.arange(64)[None]
    with torch.no_grad():
        before = base(ids).logits
        model = PeftModel.from_pretrained(base, TRAINED).eval()
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)
    stored = without_count(load_file(TRAINED / "adapter_model.safetensors"))
    loaded = without_count(get_peft_model_state_dict(model))
    assert settings_on(base).training_forwards == 228
    assert set(stored) == set(loaded) and all(torch.equal(stored[name], loaded[name]) for name in stored)
    assert model.config.max_position_embeddings == config.applied_context_length == 32768


def test_its_card_is_what_the_lines_of_its_study_say(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(TRAINED / name, tmp_path)
    trained.write(tmp_path)
    for name in ("README.md", "results.json", "training.json"):
        texts = [VERSIONS.sub("", (folder / name).read_text(encoding="utf-8")) for folder in (TRAINED, tmp_path)]
        assert texts[0] == texts[1], "run: python model_cards/trained.py"
    line = trained.read_line("memorised", trained.CELL)
    results = Results.load(TRAINED)
    ours = [row for row in results.results if row.variant == "adapter"]
    assert {row.value for row in ours if row.task == "perplexity"} == {
        line["metrics"]["perplexity"],
        line["metrics"]["perplexity_native"],
    }
    assert sum(row.value * row.units for row in ours if row.task == "passkey") == sum(
        keys["right"] for keys in line["metrics"]["passkey"].values()
    )
    assert (TRAINED / "perplexity_documents.png").is_file() and "other weights" not in (
        TRAINED / "README.md"
    ).read_text()

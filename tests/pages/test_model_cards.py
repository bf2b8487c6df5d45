"""model_cards/: each card is what model_cards/make.py renders now, and its metadata and code are sound."""

import ast
import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from peft_longlora import LongLoraConfig

FOLDER = Path(__file__).parents[2] / "model_cards"
sys.path.insert(0, str(FOLDER))
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
    links = set(re.findall(r"\]\(([^)]+)\.md\)", (FOLDER / "README.md").read_text(encoding="utf-8")))
    assert files == links == set(CARDS)

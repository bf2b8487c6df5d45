"""Every model type of transformers: supported and equal to the truth, with a condition that is named, or refused.

The default tests examine a sample, the slow ones all (about ten minutes on two cores). every_check.py says what is
examined, every_config.py how a tiny model is built; every_page.py stores what is found and makes the pages of it.
"""

import pytest
import torch
import transformers

from tests.helpers import every_page
from tests.helpers.every_check import examine
from tests.helpers.every_config import NUMBERS
from tests.helpers.every_page import PAGE, README, readme_table, stored, types, with_table

STORED = stored()
ROWS = {(row["kind"], row["type"]): row for row in STORED["results"]}
# One of each: dense, experts, latent attention, windows, chunks, states, shared layers, several axes, encoders,
# untied heads, several refusals.
SAMPLE = [
    *(("causal", name) for name in ("llama", "qwen3_moe", "deepseek_v3", "gemma3_text", "llama4_text", "gpt_neox")),
    *(("causal", name) for name in ("qwen3_5_text", "lfm2", "zamba2", "phi3", "mistral", "gemma2", "gemma4_text")),
    *(("causal", name) for name in ("bloom", "gpt2", "mamba", "doge", "phi4_multimodal", "bert")),
    *(("image", name) for name in ("qwen2_5_vl", "gemma3", "step3p7")),
]
KNOWN = types()


def check(kind: str, name: str) -> None:
    """Examine a model type, and compare what is found with what is stored."""
    transformers.logging.set_verbosity_error()
    found = examine(name, kind)
    assert found.result not in ("crashed", "wrong"), found.why
    if found.result in ("refused", "conditional"):
        assert all(len(why) > 10 for why in found.why)
    if transformers.__version__ == STORED["transformers"] and not torch.cuda.is_available():  # stored on a CPU
        row = ROWS[kind, name]
        layers = list(found.layers) if found.layers else None
        assert (found.result, found.why, layers) == (row["result"], row["why"], row["layers"])


@pytest.mark.parametrize("pair", [pair for pair in SAMPLE if pair in KNOWN], ids="-".join)
def test_a_sample_of_model_types(pair):
    check(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in KNOWN if pair not in SAMPLE], ids="-".join)
def test_every_other_model_type(pair):
    check(*pair)


def test_the_stored_results_are_complete_and_hold_no_fault():
    assert {result for result in (row["result"] for row in STORED["results"])} <= set(every_page.ORDER)
    assert not [row for row in STORED["results"] if row["result"] in ("crashed", "wrong")]
    assert len([row for row in STORED["results"] if row["result"] == "not built"]) < 8
    if transformers.__version__ == STORED["transformers"]:
        assert list(ROWS) == KNOWN


def test_the_pages_are_made_of_the_stored_results():
    cure = "run python -m tests.helpers.every_page --pages"
    assert PAGE.read_text(encoding="utf-8") == every_page.page(STORED), cure
    text = README.read_text(encoding="utf-8")
    assert readme_table(STORED) in text and with_table(text, readme_table(STORED)) == text, cure


def test_the_numbers_of_single_types_name_types_that_exist():
    if transformers.__version__ == STORED["transformers"]:
        assert set(NUMBERS) <= {name for _, name in KNOWN}

"""What every test shares: no network, one seed, and a tiny model of each kind, built in memory.

Imports nothing heavy at the top: with several workers, the process that only hands out the tests reads this too.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def pytest_collection_finish(session):
    """What imports have made stays: no later collection of garbage walks over it, which took 0.2 s each."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def llama():
    from transformers import LlamaForCausalLM

    from tests.helpers.configs import tiny_llama_config

    return LlamaForCausalLM(tiny_llama_config()).eval()


@pytest.fixture
def base_folder(tmp_path, llama) -> str:
    """A saved base model, as a user would name one."""
    llama.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture(scope="session")
def fresh_process(tmp_path_factory) -> dict:
    """What tests/helpers/fresh_process.py saw in a process of its own: importing is slow, so one process serves all."""
    from peft_longlora import LongLoraConfig

    folder = tmp_path_factory.mktemp("adapter")
    LongLoraConfig(context_length=256, target_modules=["q_proj"]).save_pretrained(folder)
    script = Path(__file__).parent / "helpers" / "fresh_process.py"
    run = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])

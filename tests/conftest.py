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

# Whole folders, or files, that share processes started for them: one worker runs all of a line.
TOGETHER = {
    "tests/hub/": "tests/hub/",
    "tests/sequence/": "ranks",
    "tests/attention/test_schedule.py": "ranks",
    "tests/pages/test_benchmark_scripts.py": "ranks",
}
# They take longest, so that they begin first and the workers end together.
FIRST = ("tests/hub/", "tests/pages/test_examples.py", "tests/sequence/", "tests/whole/")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadfile`, but that what shares processes stays together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return next(
                (name for start, name in TOGETHER.items() if nodeid.startswith(start)), super()._split_scope(nodeid)
            )

    return Together(config, log)


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


@pytest.fixture
def no_plots(monkeypatch):
    """Evaluations draw nothing: drawing takes a third of the time of a tiny one."""
    monkeypatch.setattr("peft_longlora.eval.report.plots.write_plots", lambda results, folder: [])


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

"""The wheel, built and installed in an empty environment, runs the quick start's code there."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
import peft_longlora
from peft import AutoPeftModelForCausalLM, get_peft_model
from peft_longlora import LongLoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

assert "site-packages" in peft_longlora.__file__, peft_longlora.__file__
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="s2_attn")
model = get_peft_model(model, LongLoraConfig(r=4, context_length=1024, task_type="CAUSAL_LM")).train()
batch = AutoTokenizer.from_pretrained(folder)("def f(x): return x\\n" * 100, return_tensors="pt")
model(**batch, labels=batch["input_ids"]).loss.backward()
assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
model.save_pretrained(out)
again = AutoPeftModelForCausalLM.from_pretrained(out)
assert (again(**batch).logits == model.eval()(**batch).logits).all()
print("ran from", peft_longlora.__file__)
"""


def build(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_runs_in_an_empty_environment(tmp_path):
    """Takes minutes and a package index: torch and all else are installed anew."""
    wheel = build(tmp_path)
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert "peft_longlora/py.typed" in names and "peft_longlora/hub/templates/adapter_card.md" in names
    assert not [n for n in names if n.startswith(("tests", "examples", "benchmarks"))]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run([str(part) for part in install], check=True)
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [
        str(python),
        "-I",  # nothing of PYTHONPATH
        str(tmp_path / "run.py"),
        str(ROOT / "examples/assets/stdlib-llama-512"),
        str(tmp_path / "adapter"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ran from" in done.stdout

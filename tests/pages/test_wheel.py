"""What a release uploads, wheel and sdist, is built once and used as a stranger would, outside the checkout."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from peft_longlora import __version__
from tests.helpers.paths import EMBEDDED, ROOT

pytestmark = pytest.mark.slow

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


def run(*command, cwd: Path) -> str:
    """What a command prints, in an environment without the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built out of it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def metadata(dist) -> str:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as file:
        return file.read(f"peft_longlora-{__version__}.dist-info/METADATA").decode()


def test_the_index_accepts_both(dist):
    pytest.importorskip("twine", reason="needs twine: pip install twine")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)
    assert said.count("PASSED") == 2


def test_the_description_leads_to_files_of_the_release(metadata):
    """Relative links and pictures would lead nowhere on the index's page."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", metadata)
    ours = [t for t in targets if f"/v{__version__}/" in t]
    assert len(ours) > 10 and all(target.startswith(("https:", "http:")) for target in targets)
    for target in ours:
        assert (ROOT / target.partition(f"/v{__version__}/")[2]).exists(), target
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", metadata)
    assert pictures and all(
        p.startswith("https://raw.githubusercontent.com/") or p.endswith(".svg") or "shields.io" in p for p in pictures
    )


def test_the_wheel_holds_the_package_alone(dist, metadata):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as file:
        names = file.namelist()
    with_code = {"py.typed", "hub/templates/adapter_card.md", "app/page.css"}
    assert {f"peft_longlora/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} < set(names)
    assert {"longlora_command.py", *(f"peft_longlora/{name}" for name in with_code)} <= set(names)
    assert {name.partition("/")[0] for name in names} == {
        "longlora_command.py", "peft_longlora", f"peft_longlora-{__version__}.dist-info",
    }  # fmt: skip
    for field in ("Author", "License-Expression", "Keywords", "Project-URL", "Classifier"):
        assert re.search(rf"^{field}: \S", metadata, re.MULTILINE), field


def test_the_wheel_runs_in_an_empty_environment(dist, tmp_path):
    """Takes minutes and a package index: torch and all else are installed anew."""
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    run(
        programs / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", next(dist.glob("*.whl")),
        cwd=tmp_path,
    )  # fmt: skip
    (tmp_path / "run.py").write_text(SCRIPT)
    assert "ran from" in run(programs / "python", "run.py", EMBEDDED, tmp_path / "adapter", cwd=tmp_path)
    assert __version__ in run(programs / "longlora", "--version", cwd=tmp_path)
    assert __version__ in run(programs / "python", "-m", "peft_longlora", "--version", cwd=tmp_path)
    commands = re.findall(r"^    ([a-z]+)  ", run(programs / "longlora", "--help", cwd=tmp_path), re.MULTILINE)
    assert {"train", "eval", "compare", "chat", "push"} <= set(commands)
    for command in commands:
        assert f"longlora {command}" in run(programs / "longlora", command, "--help", cwd=tmp_path)


def test_the_sdist_brings_its_own_tests_and_pages(dist, tmp_path):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as file:
        file.extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    found = run(sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=folder)
    assert sum(map(int, re.findall(r"^tests/\S+: (\d+)$", found, re.MULTILINE))) > 1000
    assert (folder / "examples/assets" / EMBEDDED.name / "model.safetensors").is_file()  # notebooks/ takes it from here
    for name in ("docs", "examples", "experiments", "recipes", "tests/pages"):
        here = {path.name for path in (ROOT / name).iterdir() if path.is_file()}
        assert here == {path.name for path in (folder / name).iterdir() if path.is_file()}, name

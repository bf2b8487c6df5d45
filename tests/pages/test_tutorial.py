"""docs/tutorial.md, command by command as it stands, on the embedded model; at the end an adapter is on a hub.

Fewer steps and less text than on the page; nothing else is changed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.loopback_hub import TOKEN, LoopbackHub
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs/tutorial.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHORTER = {
    "--max-steps 20": "--max-steps 1",
    "--gradient-accumulation-steps 2": "",
    "512,1024,2048": "512,768",
    "--context-length 2048": "--context-length 768",
    "you/my-adapter": "me/my-adapter",  # the hub's user
    "> 40_000": "> 60_000",
}


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the page's blocks, without what installs the package."""
    found = []
    for language, text in FENCE.findall(PAGE):
        for old, new in SHORTER.items():
            text = text.replace(old, new)
        text = "".join(line for line in text.splitlines(True) if not re.match(r"(git clone|pip install) ", line))
        found.append((language, text))
    return found


def test_the_page_is_what_is_shortened_here():
    assert all(old in PAGE for old in SHORTER)
    assert [language for language, _ in FENCE.findall(PAGE)].count("bash") >= 6


@pytest.mark.slow
def test_from_a_folder_of_books_to_a_pushed_adapter(tmp_path):
    """Takes minutes: every command is a process of its own."""
    for name in ("examples", "docs", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, call in (("longlora", "-m peft_longlora"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        (programs / name).chmod(0o755)
    script = "set -e\n"
    for number, (language, text) in enumerate(blocks()):
        if language == "python":
            (tmp_path / f"block{number}.py").write_text(text)
            text = f"python block{number}.py\n"
        script += text
    with LoopbackHub() as hub:
        environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "CUDA_VISIBLE_DEVICES": "",
            "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        files = hub.files("me/my-adapter")
    card = files["README.md"].decode()
    assert "adapter_model.safetensors" in files and "results.json" in files
    assert "| perplexity" in card and str(tmp_path) not in card
    assert re.search(r"\| perplexity \| documents \| .* \| 768.* \| base \|", card), "the gain is seen on the card"
    dtypes = {json.loads(path.read_text())["model"]["dtype"] for path in tmp_path.glob("runs/**/results.json")}
    assert dtypes == {"float32"}, "else the base is measured in another type than the adapter"
    assert any(name.endswith(".png") for name in files)
    table = Path(tmp_path, "runs/base/results.md").read_text()
    assert "perplexity" in table and "768" in table
    assert Path(tmp_path, "my-model/model.safetensors").is_file()
    assert Path(tmp_path, "my-model/tokenizer.json").is_file()

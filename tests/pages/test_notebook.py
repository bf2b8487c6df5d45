"""notebooks/quickstart.ipynb runs from its first cell to its last, and its stored outputs name no machine."""

import json
import re
import sysconfig
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PATH = ROOT / "notebooks" / "quickstart.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
SMALL = 'CONTEXT_LENGTH, STEPS, WINDOWS, OUTPUT = 768, 3, 1, Path("out")'


def test_nothing_stored_names_a_machine():
    stored = json.dumps([cell.get("outputs", []) for cell in NOTEBOOK["cells"]])
    assert not re.search(r"(?<![\w.])/(root|home|work|tmp|usr|mnt|Users)\b|[A-Z]:\\\\", stored)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"


def test_it_names_what_exists():
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    for name in re.findall(r'"(examples/[\w/.-]+)"', text):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    """In a kernel of its own, on a window of 768 tokens, three steps and little text; its two plots are there."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel: pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(PATH, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    library, few = Path(sysconfig.get_paths()["stdlib"]), tmp_path / "stdlib"
    few.mkdir()
    for name in ("argparse", "configparser", "difflib", "ipaddress", "mailbox", "statistics", "subprocess", "tarfile",
                 "ast", "doctest"):  # fmt: skip
        (few / f"{name}.py").symlink_to(library / f"{name}.py")
    parameters.source = f"import stdlib_text\n\nread = stdlib_text.read_stdlib\n{SMALL}\n"
    parameters.source += f"stdlib_text.read_stdlib = lambda: read({str(few)!r})"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "run").mkdir()
    # The notebook looks for examples/assets beside it and in the folders above.
    (tmp_path / "run" / "examples").symlink_to(ROOT / "examples")
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "run")}}
    ).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    tables = [
        eval(output["data"]["text/plain"])
        for output in shown
        if output.output_type == "execute_result" and "512-768" in output["data"].get("text/plain", "")
    ]
    before, rescaled, after = (table["512-768"] for table in tables)
    assert before > 1.3 * after and before > rescaled  # beyond its window the base does not know where it is
    assert (tmp_path / "run/out/adapter_model.safetensors").is_file()
    assert (tmp_path / "run/out/merged/model.safetensors").is_file()

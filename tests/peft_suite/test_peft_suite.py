"""PEFT's own tests, with `LongLoraConfig` in place of `LoraConfig`: decoders, configs, ties, low-level API, conversion.

`make peft-suite`, or by hand:

    pip install -c constraints.txt -e ".[suite]"
    pytest -m slow tests/peft_suite -rP

The tests come from PyPI, out of the source distribution of the installed peft, and nothing of them is kept here. They
run in a process of their own, with the models of models.py in place of the Hub's. plugin.py swaps the config there, and
expected.yaml says which tests must fail with which error. Of the three profiles, "stock" is the control, the same tests
with `LoraConfig` itself; "lora" is LoRA with scaled RoPE and S2-Attn; "whole" trains embeddings and norms as well.

`-rP` shows the counts of each run; "xfailed" are the tests on the list. The three take four minutes on one free core.
If one fails, its message ends with the command that runs it again.
"""

import os
import shlex
import subprocess
import sys
import tarfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1]

FILES = [
    "tests/test_decoder_models.py",
    "tests/test_target_parameters.py",
    "tests/test_config.py",
    "tests/test_low_level_api.py",
    "tests/test_lora_conversion.py",
    "tests/test_initialization.py::TestLoadPeftKeyMapping",
    "tests/test_initialization.py::TestWeightTying",
    "tests/test_other.py::TestGetModuleNamesTiedWithEmbedding",
    "tests/test_tuners_utils.py::TestBaseTunerWarnForTiedEmbeddings",
]
# Makes configs with trainable_token_indices while it is imported, which train_embeddings=True refuses.
TRAINABLE_TOKENS = "tests/test_trainable_tokens.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("diffusers", "parameterized", "scipy")),
        reason='PEFT\'s tests need pip install -c constraints.txt -e ".[suite]"',
    ),
]


def run(*command: str, cwd: Path, **environment: str) -> str:
    """What a process prints, which has to end well."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3600,
    )
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\ncd {cwd} && {settings} {shlex.join(command)}"
    return done.stdout


@pytest.fixture(scope="module")
def peft_source(tmp_path_factory) -> Path:
    """The folder of PEFT's source distribution, of the version that is installed."""
    folder, name = tmp_path_factory.mktemp("sdist"), f"peft-{version('peft')}"
    download = ["-m", "pip", "download", "--no-deps", "--no-binary", "peft", name.replace("-", "==", 1)]
    run(sys.executable, *download, cwd=folder)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    assert (folder / name / FILES[0]).is_file(), f"The source distribution {name} holds no tests."
    (folder / name / "tests" / "__init__.py").touch()  # its tests import each other as a package
    (folder / name / "pytest.ini").write_text("[pytest]\n")  # in place of PEFT's own settings, which need pytest-cov
    return folder / name


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory) -> Path:
    """The Hub's cache, with the models of models.py in it."""
    folder = tmp_path_factory.mktemp("hub")
    run(sys.executable, str(HERE / "models.py"), str(folder), cwd=HERE)
    return folder


@pytest.mark.parametrize("profile", ["stock", "lora", "whole"])
def test_what_must_fail_fails_and_nothing_else(profile, peft_source, hub_cache):
    files = FILES if profile == "whole" else [*FILES, TRAINABLE_TOKENS]
    output = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider"),
        *("--profile", profile, "--tb=line", "--show-capture=no", "--disable-warnings", "-rfE", *files),
        cwd=peft_source,
        HF_HUB_CACHE=str(hub_cache),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join([str(HERE), str(PACKAGE)]),
    )
    print(f"{profile}: {output.splitlines()[-1]}")

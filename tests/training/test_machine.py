"""What a run needs of the machine is refused by `--dry-run` too: whatever a real run refuses, before its weights."""

import re

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available

from peft_longlora.training.machine import NOT_CHECKED

pytest.importorskip("trl", minversion="1.16")
bitsandbytes = pytest.mark.skipif(is_bitsandbytes_available(), reason="it is installed")
liger = pytest.mark.skipif(is_liger_kernel_available(), reason="it is installed")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(["--four-bit"], "four_bit=True cannot be used.*install -U bitsandbytes", marks=bitsandbytes),
        pytest.param(["--optim", "adamw_bnb_8bit"], "bnb_8bit.* cannot be used.*install -U bits", marks=bitsandbytes),
        pytest.param(["--use-liger-kernel"], "pip install liger-kernel", marks=liger),
        (["--lr-scheduler-type", "cosine_with_min_lr"], "lr_scheduler_kwargs={} cannot be used: .*min_lr"),
        (["--lr-scheduler-type", "polynomial", "--lr-scheduler-kwargs", "{bad: 1}"], "'bad': 1} cannot be used: .*bad"),
        (["--neftune-noise-alpha", "-1"], "neftune.noise.alpha.+-1.0 must be 0 or more"),
        (["--push-to-hub"], "needs a token that may write. Log in with `hf auth login`"),
        (["--push-to-hub", "--hub-model-id", "a b/c"], "a b/c"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_before_anything_is_loaded(run, monkeypatch, words, said):
    monkeypatch.setattr("peft_longlora.training.machine.get_token", lambda: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for dry in (("--dry-run",), ()):
        code, _, err, folder = run(*words, *dry)
        (line,) = [line for line in err.splitlines() if "error: " in line]
        assert code == 2 and re.search(said, line), line
        assert not folder.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--optim", "sgd"), ("--optim", "adafactor"), ("--warmup-steps", "0.5"), ("--lr-scheduler-type", "constant"),
        ("--lr-scheduler-type", "warmup_stable_decay", "--lr-scheduler-kwargs", "{num_decay_steps: 1}"),
    ],
)  # fmt: skip
def test_what_is_there_is_not_refused(run, words):
    code, said, err, _ = run(*words, "--dry-run")
    assert code == 0, err
    assert said.splitlines()[-1] == NOT_CHECKED

"""The setting of PyTorch's allocator that a nearly full GPU needs."""

import os

import pytest

from peft_longlora.cli.main import main
from peft_longlora.memory import fit, fit_memory
from peft_longlora.memory.fragments import EXPANDABLE, SETTINGS, advice, expand_segments
from tests.helpers.measured_gpu import NAMED, Machine
from tests.helpers.tiny import extend, make

NEW, OLD, _ = SETTINGS


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """The settings are not there; afterwards they are as before."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "")


def settings():
    return {name: value for name in SETTINGS if (value := os.environ[name])}


def test_segments_grow_unless_the_user_has_set_up_the_allocator(monkeypatch):
    assert f"{NEW}={EXPANDABLE}" in advice()
    for name in SETTINGS:
        with monkeypatch.context() as patched:
            patched.setenv(name, "max_split_size_mb:512")
            expand_segments()
            assert settings() == {name: "max_split_size_mb:512"} and advice()
            patched.setenv(name, f"max_split_size_mb:512,{EXPANDABLE}")
            assert not advice()
    expand_segments()
    assert settings() == {NEW: EXPANDABLE} and not advice()


@pytest.mark.parametrize("grow", [False, True])
def test_fit_memory_says_what_helps_against_fragments(monkeypatch, grow):
    Machine(monkeypatch)
    said = []
    monkeypatch.setattr(fit.logger, "info", said.append)
    if grow:
        expand_segments()
    plan = fit_memory(extend(make()), 60_000, NAMED)
    [text] = [one for one in said if str(plan) in one]
    assert (EXPANDABLE in text) is not grow and text == text.rstrip()


def test_longlora_train_lets_segments_grow(monkeypatch, tmp_path):
    seen, folder = [], str(tmp_path)
    monkeypatch.setattr("peft_longlora.training.run.train", lambda *_, **__: seen.append(settings()) or 0)
    options = ["--model", folder, "--data", folder, "--output-dir", folder, "--context-length", "4096"]
    assert main(["train", *options]) == 0
    assert seen == [{NEW: EXPANDABLE}]

"""An adapter whose making is interrupted: Ctrl-C, or the stop of a notebook's cell, leaves the base as it was."""

import importlib

import pytest
import torch

from tests.helpers.tiny import assert_same, extend, logits, make, snapshot


@pytest.mark.parametrize(
    ("place", "name", "number"),
    [
        ("adapter.lowrank", "compute_in_half", 3),  # some projections are adapted
        ("adapter.fit", "check_after", 1),  # all is in its place
        ("rope.scale", "transplant", 1),  # RoPE is rescaled
    ],
)
def test_the_base_is_left_as_it_was(monkeypatch, place, name, number):
    model, calls = make(), []
    before = snapshot(model)
    module = importlib.import_module(f"peft_longlora.{place}")
    real = getattr(module, name)

    def interrupted(*args):
        calls.append(args)
        real(*args)
        if len(calls) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        extend(model)
    assert_same(snapshot(model), before)
    monkeypatch.undo()
    assert not torch.equal(logits(extend(model)), before["logits"])

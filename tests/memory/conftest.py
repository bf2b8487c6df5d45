"""Tensors that wait in the host's memory, on a CPU."""

import pytest
import torch

from peft_longlora.memory import offload
from tests.helpers.host_copies import Away


@pytest.fixture
def without_gpu(monkeypatch):
    made = []
    monkeypatch.setattr(Away, "back", 0)
    monkeypatch.setattr(Away, "leaving", 0)
    monkeypatch.setattr(Away, "handed", 0)
    monkeypatch.setattr(Away, "most", 0)
    monkeypatch.setattr(offload, "_Away", Away)
    monkeypatch.setattr(offload.torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(offload, "_leaves", lambda x: x.is_floating_point() and not isinstance(x, torch.nn.Parameter))
    monkeypatch.setattr(offload, "_pinned", lambda size: made.append(size) or torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(offload, "CHUNK", 2**10)
    monkeypatch.setattr(offload, "SLAB", 2**12)
    return made

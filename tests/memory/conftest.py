"""What tests of memory share, on a CPU: copies to the host's memory, and the bytes that tensors hold."""

import gc

import pytest
import torch

from peft_longlora.memory import places
from tests.helpers.held_bytes import Held
from tests.helpers.host_copies import Away, leaves


@pytest.fixture
def without_gpu(monkeypatch):
    made = []
    monkeypatch.setattr(Away, "back", 0)
    monkeypatch.setattr(Away, "leaving", 0)
    monkeypatch.setattr(Away, "handed", 0)
    monkeypatch.setattr(Away, "most", 0)
    monkeypatch.setattr(places, "_Away", Away)
    monkeypatch.setattr(places.torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(places, "_leaves", leaves)
    monkeypatch.setattr(places, "_pinned", lambda size: made.append(size) or torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(places, "CHUNK", 2**10)
    monkeypatch.setattr(places, "SLAB", 2**12)
    return made


@pytest.fixture
def held():
    """Counts what tensors hold from here on."""
    gc.collect()
    with Held() as held:
        yield held

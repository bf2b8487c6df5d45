"""The bytes that tensors hold at a time, on any device: counted where operators make them, and where storages die."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_longlora.memory import fit


class Held(TorchDispatchMode):
    """Within this context, `now` and `most` are what PyTorch's allocator would say of a GPU with these tensors."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self._storages = 0, 0, {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was made before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages and size:
            self._storages[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.most = max(self.most, self.now)

    def forget(self, *_) -> None:
        """As `torch.cuda.reset_peak_memory_stats`."""
        self.most = self.now

    def _gone(self, key: int, size: int) -> None:
        del self._storages[key]
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and not each.is_meta:
                self.add(each)
        return out


def as_gpu(held: Held, monkeypatch, shortest: int) -> None:
    """`fit_memory` measures a model on a CPU by what is held, with a first step of `shortest` tokens."""
    monkeypatch.setattr(fit, "SHORTEST", shortest)
    monkeypatch.setattr(fit, "_check", lambda *_: None)
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda *_, **__: fork(devices=[]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", held.forget)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: held.most)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**11, 10**11))


def loss(model, ids):
    """As a fused one: no logits of the whole row."""
    return model(input_ids=ids, logits_to_keep=8).logits.float().logsumexp(-1).sum()

"""Tensors that wait in the host's memory: of several GPUs, of replicas of a model, and of its copies."""

import copy
import gc
import threading
from types import SimpleNamespace

import pytest
import torch

from peft_longlora import configure_attention
from peft_longlora.memory import checkpoint_blocks, places
from peft_longlora.memory.blocks import find_blocks
from tests.helpers.tiny import IDS, extend, make


def step(model, ids=IDS):
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def gradient(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("every", [2, 3])
def test_replicas_in_two_threads(without_gpu, every):
    """As nn.DataParallel runs them: they share the blocks' switches, and the second is in a block before the first has
    left it."""
    model = make(num_hidden_layers=4)
    configure_attention(model, group_size=16)
    checkpoint_blocks(model.train(), keep=False, offload=every)
    rows, losses = (IDS, IDS.flip(1)), {}
    begun, followed, ended = threading.Event(), threading.Event(), threading.Event()

    def in_turn(*_):
        is_first = threading.current_thread() is threads[0]
        (begun if is_first else followed).set()
        assert (followed if is_first else ended).wait(20)

    def forward(number):
        losses[number] = replicas[number](input_ids=rows[number], labels=rows[number], use_cache=False).loss

    handle = find_blocks(model)[0].mlp.register_forward_hook(in_turn)
    replicas = [replica_of(model) for _ in rows]  # with the hook
    threads = [threading.Thread(target=forward, args=(number,)) for number in (0, 1)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    threads[0].join()
    ended.set()
    threads[1].join()
    handle.remove()
    sum(losses.values()).backward()
    together = gradient(model)
    model.zero_grad()
    checkpoint_blocks(model, free=4)
    for one in rows:
        model(input_ids=one, labels=one, use_cache=False).loss.backward()
    for name, grad in gradient(model).items():
        torch.testing.assert_close(together[name], grad, msg=name)


def replica_of(module):
    """As `torch.nn.parallel.replicate`, with the parameters themselves."""
    copied = module._replicate_for_data_parallel()
    copied._parameters = dict(module._parameters)
    copied._modules = {name: child and replica_of(child) for name, child in module._modules.items()}
    return copied


def test_each_gpu_has_a_stream_and_memory_of_its_own(without_gpu, monkeypatch):
    """This GPU's stream does not make another's copies: one may not have ended when its memory is used again."""
    monkeypatch.setattr(places, "_leaves", lambda tensor: True)
    monkeypatch.setattr(places.torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(places, "_Away", OnDevice)
    host = places.HostMemory()
    first = [host.put(on(f"cuda:{number}"), number) for number in (0, 1)]
    assert [one.stream for one in first] == ["stream of cuda:0", "stream of cuda:1"] and host.most == 6000
    pieces = [{id(chunk) for chunk in one.chunks} for one in first]
    first.pop(0)
    gc.collect()
    again = host.put(on("cuda:1"), 1)
    assert not pieces[0] & {id(chunk) for chunk in again.chunks}


def test_a_copy_that_runs_out_of_memory_takes_no_pinned_memory(monkeypatch):
    """Attention's output may have to be made contiguous first."""
    monkeypatch.setattr(places.torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(places, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(places, "_leaves", lambda tensor: True)

    def contiguous():
        raise torch.OutOfMemoryError("no memory")

    tensor = SimpleNamespace(shape=(1,), dtype=torch.float32, device="cuda:0", nbytes=4, contiguous=contiguous)
    monkeypatch.setattr(places, "SLAB", 2**10)
    place = places._Place()
    place._spare.extend(place._room(4))
    pieces = len(place._spare)
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            place.put(tensor, 0)
    assert len(place._spare) == pieces


def on(device):
    tensor = SimpleNamespace(device=device, nbytes=3000)
    tensor.contiguous = lambda: tensor
    return tensor


class OnDevice:
    """As `places._Away`, without its copies."""

    def __init__(self, tensor, chunks, stream, block):
        self.device, self.size, self.block = tensor.device, tensor.nbytes, block
        self.chunks, self.stream = chunks, stream

    def leave(self):
        pass


@pytest.mark.parametrize("options", [dict(keep=False, offload=2), dict(keep=1, keep_in_host=2)])
def test_a_model_is_copied_after_a_step(without_gpu, monkeypatch, options):
    """Streams cannot be copied."""
    monkeypatch.setattr(places.torch.cuda, "Stream", lambda device: torch.Stream(device="cpu"))
    model = extend(make(num_hidden_layers=4), group_size=16).train()
    checkpoint_blocks(model, **options)
    found = []
    for copied in range(2):
        if copied:
            model = copy.deepcopy(model)
            assert len({id(block._gradient_checkpointing_func) for block in find_blocks(model)}) == 4
        step(model)
        found.append(gradient(model))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)

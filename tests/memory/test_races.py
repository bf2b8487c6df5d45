"""Copies on a stream of their own, made as late as they may be: gradients are right, and no memory is used too soon."""

import gc

import pytest
import torch

from peft_longlora.memory import checkpoint_blocks, places
from peft_longlora.memory.blocks import find_blocks
from tests.helpers.late_copies import Stream, on_late_stream
from tests.helpers.tiny import IDS, extend, make

OPTIONS = [
    *(dict(keep=False, offload=every) for every in (1, 2, 3)),
    dict(keep=1, keep_in_host=2),
    dict(keep=1, keep_in_host=3, offload=2, tile_tokens=40),
    dict(keep_in_host=2, free=1, keep=0, offload=1),
]


def tiny():
    return extend(make(num_hidden_layers=4), group_size=16, lora_dropout=0.2).train()


def loss_of(model, seed, ids=IDS):
    torch.manual_seed(seed)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def taken(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain(model, *seeds):
    checkpoint_blocks(model, free=4)
    for seed in seeds:
        loss_of(model, seed).backward()
    return taken(model)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_one_after_another(monkeypatch, options):
    model, races = tiny(), on_late_stream(monkeypatch)
    expected = plain(model, 1, 2, 3)
    checkpoint_blocks(model, **options)
    for seed in (1, 2, 3):
        loss_of(model, seed).backward()
    assert_same(taken(model), expected)
    assert races.finish() and not races


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_graphs_at_once(monkeypatch, options, first):
    """As in pipelines, and in losses that compare two answers."""
    model, races = tiny(), on_late_stream(monkeypatch)
    expected = plain(model, 1, 2)
    checkpoint_blocks(model, **options)
    losses = [loss_of(model, seed) for seed in (1, 2)]
    losses[first].backward()
    losses[1 - first].backward()
    assert_same(taken(model), expected)
    assert races.finish() and not races


@pytest.mark.parametrize("calls", [2, 4, 5, 7])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_that_an_error_ends(monkeypatch, options, calls):
    """In the forward or the backward; then comes a whole one."""
    model, races = tiny(), on_late_stream(monkeypatch)
    expected = plain(model, 2)
    checkpoint_blocks(model, **options)
    seen = []

    def stop(*_):
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt

    handles = [block.self_attn.register_forward_hook(stop) for block in find_blocks(model)]
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, 1).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    gc.collect()
    loss_of(model, 2).backward()
    assert_same(taken(model), expected)
    assert races.finish() and not races


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_loss_that_nobody_wants(monkeypatch, options):
    model, races = tiny(), on_late_stream(monkeypatch)
    expected = plain(model, 2)
    checkpoint_blocks(model, **options)
    loss_of(model, 1)
    loss_of(model, 2).backward()
    assert_same(taken(model), expected)
    assert races.finish() and not races


@pytest.mark.parametrize("options", [dict(keep=False, offload=1), dict(keep=1, keep_in_host=2)], ids=str)
def test_the_stream_that_computed_waits_for_a_loss_that_another_drops(monkeypatch, options):
    """A thread has a current stream of its own. Memory goes back to the stream on which it was taken."""
    model, races = tiny(), on_late_stream(monkeypatch)
    checkpoint_blocks(model, **options)
    loss = loss_of(model, 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Other(races))
    del loss
    gc.collect()
    monkeypatch.undo()
    assert races.finish() and not races


class Other(Stream):
    """Its waiting lets no copy of another stream come before the computing stream goes on."""

    def wait_event(self, event):
        pass


def test_a_block_that_changes_its_input_is_refused(monkeypatch):
    """As torch refuses it if nothing is copied. A copy may hold the old numbers or the new ones."""
    model, _ = tiny(), on_late_stream(monkeypatch)

    def change(_module, given, _out):
        given[0].add_(1.0)

    find_blocks(model)[1].register_forward_hook(change)
    checkpoint_blocks(model, keep=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(model, 1).backward()
    checkpoint_blocks(model, keep=False, offload=True)
    with pytest.raises(RuntimeError, match=r"of shape \(2, 96, 32\) that block 1 needs .* changed in place"):
        loss_of(model, 1).backward()
    gc.collect()


@pytest.mark.parametrize("later", [0, places.LEAVING])
def test_a_tensor_that_is_changed_after_its_copy_is_not(monkeypatch, later):
    """Attention's output, while it is on its way or when others have followed."""
    on_late_stream(monkeypatch)
    host, x = places.HostMemory(), torch.ones(512)
    packed = host.put(x.detach(), 0)
    others = [host.put(torch.zeros(512), 1) for _ in range(later)]
    x.add_(1.0)
    if later:
        assert len(others) == later and host.get(packed).eq(1.0).all()
    else:
        with pytest.raises(RuntimeError, match="changed in place"):
            host.get(packed)

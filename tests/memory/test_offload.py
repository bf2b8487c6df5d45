"""Inputs of blocks that wait in the host's memory: when each comes back, and when its memory is used again.

On a CPU, with copies that are made at once in place of those on a stream; test_blocks.py runs the real ones on a GPU.
"""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from peft_longlora.memory import checkpoint_blocks, fit, places
from peft_longlora.memory.blocks import find_blocks
from tests.helpers.every_config import tiny_model
from tests.helpers.host_copies import Away
from tests.helpers.tiny import IDS, extend, make

INPUT = 2 * 96 * 32 * 4  # bytes in a block's input


def gradients(model):
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    return loss, lambda: {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("every", [1, 2, 3])
def test_steps_are_the_plain_ones_and_their_host_memory_is_used_again(without_gpu, every):
    model = extend(make(num_hidden_layers=6), group_size=16, lora_dropout=0.2).train()
    loss, grads = gradients(model)
    loss.backward()
    plain = grads()
    checkpoint_blocks(model, keep=False, offload=every)
    for _ in range(3):
        loss, grads = gradients(model)
        loss.backward()
        for name, grad in grads().items():
            torch.testing.assert_close(grad, plain[name], msg=name)
        del loss
        gc.collect()
    inputs = INPUT * 6 / every  # for all three steps
    assert inputs <= sum(without_gpu) < inputs + 2**12
    assert Away.back == Away.leaving == 0
    assert Away.handed == 3 * 6  # with every second input, the kept ones are needed twice
    assert Away.most <= 1  # one is on its way while one is used


@pytest.mark.parametrize(
    ("kind", "every", "inputs"), [("llama", 2, 1), ("lfm2", 2, 2), ("zamba", 1, 12), ("zamba", 2, 9)]
)
def test_what_waits_at_once_is_measured(without_gpu, kind, every, inputs):
    """Zamba gives each block the embeddings too, and adds something to the input of some."""
    model = extend(tiny_model(kind), group_size=16).train()
    blocks = model.config.num_hidden_layers
    checkpoint_blocks(model, keep=False, offload=every)
    for _ in range(2):
        gradients(model)[0].backward()
    one = IDS.numel() * model.config.hidden_size * 4
    expected = inputs * one / IDS.numel() / -(-blocks // every)
    assert fit._bytes_in_host(model, IDS.numel(), every) == pytest.approx(expected)


@pytest.mark.parametrize("options", [dict(keep=False), dict(keep=False, tile_tokens=40), dict(keep=1, keep_in_host=3)])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_what_has_left_is_held_by_nobody(without_gpu, monkeypatch, every, options):
    """Storages of inputs, and of attention's outputs, after the forward and before the backward."""
    storages, put = [], places.HostMemory.put

    def watch(self, tensor, block):
        if places._leaves(tensor) and tensor.numel() >= 512:
            storages.append(StorageWeakRef(tensor.untyped_storage()))
        return put(self, tensor, block)

    monkeypatch.setattr(places.HostMemory, "put", watch)
    model = extend(make(num_hidden_layers=6), group_size=16).train()
    checkpoint_blocks(model, offload=every, **options)
    gc.collect()
    gc.disable()  # nobody waits for the collector in a step
    try:
        loss, _ = gradients(model)
        assert len(storages) >= 6 / every and all(storage.expired() for storage in storages)
    finally:
        gc.enable()
    loss.backward()


@pytest.mark.parametrize("between", ["a layer with a state", "a sum", "a sum in place"])
def test_what_stands_between_two_blocks_is_not_left_out(without_gpu, between):
    if between == "a layer with a state":
        kinds = ["full_attention", "linear_attention", "full_attention", "full_attention"]
        heads = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
        base = make("qwen3_5_text", num_hidden_layers=4, layer_types=kinds, head_dim=16, **heads)
    else:
        base = make(num_hidden_layers=4)
    model = extend(base, group_size=16).train()
    if between != "a layer with a state":
        add = (lambda x: x.add_(1.0)) if between == "a sum in place" else (lambda x: x + 1.0)
        for layer in model.get_base_model().model.layers:
            run = layer.__class__.__call__
            layer.__class__ = type(
                "Layer", (layer.__class__,), {"__call__": lambda self, *a, run=run, **k: add(run(self, *a, **k))}
            )
    blocks = find_blocks(model)
    checkpoint_blocks(model, free=len(blocks))
    loss, grads = gradients(model)
    loss.backward()
    plain = grads()
    for every in (2, 3):
        checkpoint_blocks(model, keep=False, offload=every)
        loss, grads = gradients(model)
        loss.backward()
        for name, grad in grads().items():
            torch.testing.assert_close(grad, plain[name], msg=name)


def test_attention_waits_there_too(without_gpu):
    model = extend(make(num_hidden_layers=4), group_size=16, lora_dropout=0.2).train()
    loss, grads = gradients(model)
    loss.backward()
    plain = grads()
    checkpoint_blocks(model, keep=1, keep_in_host=2, offload=True, tile_tokens=40)
    for _ in range(2):
        loss, grads = gradients(model)
        assert Away.leaving == places.LEAVING
        loss.backward()
        for name, grad in grads().items():
            torch.testing.assert_close(grad, plain[name], msg=name)
        del loss
        gc.collect()
    # Inputs of four blocks; of two blocks an output and a log-sum-exp of each of attention's calls. For both steps.
    kept = Away.handed // 2 - 4
    assert kept > 0 and kept % 4 == 0 and Away.back == Away.leaving == 0
    assert 6 * INPUT < sum(without_gpu) < 6 * INPUT + 2 * INPUT / 8 + (kept + 4) * 2**10 + 2**12
    assert Away.most <= kept + 1  # what one block needs, and what the block before needs


def test_a_second_backward_is_refused():
    model = extend(make(), group_size=16).train()
    checkpoint_blocks(model, keep_in_host=2)
    loss, _ = gradients(model)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="A second backward through a block that keeps its attention"):
        loss.backward()


def test_two_graphs_at_once_do_not_share_memory(without_gpu):
    """As with pipelines: a second forward comes before the first backward."""
    model = extend(make(num_hidden_layers=4), group_size=16).train()
    loss, grads = gradients(model)
    loss.backward()
    plain = grads()
    checkpoint_blocks(model, keep=False, offload=2)
    first, grads = gradients(model)
    second = model(input_ids=IDS.flip(1), labels=IDS, use_cache=False).loss
    first.backward()
    for name, grad in grads().items():
        torch.testing.assert_close(grad, plain[name], msg=name)
    assert second.isfinite()


def test_a_graph_that_is_dropped_gives_its_memory_back(without_gpu):
    model = extend(make(num_hidden_layers=4), group_size=16).train()
    checkpoint_blocks(model, keep=False, offload=True)
    for _ in range(3):
        loss, _ = gradients(model)
        del loss
        gc.collect()
    assert 4 * INPUT <= sum(without_gpu) < 4 * INPUT + 2**12 and Away.handed == 0


def test_rows_of_any_length_share_the_memory(without_gpu):
    model = extend(make(num_hidden_layers=4), group_size=16).train()
    checkpoint_blocks(model, keep=False, offload=True)
    for length in (96, 40, 77, 64):
        loss = model(input_ids=IDS[:, :length], labels=IDS[:, :length], use_cache=False).loss
        loss.backward()
        del loss
        gc.collect()
    assert sum(without_gpu) < 4 * INPUT + 2**12


@pytest.mark.parametrize("every", [2, 3])
def test_a_step_leaves_nothing_behind_where_a_block_is_free(without_gpu, every):
    """The last checkpointed block must not keep its input for a block that is free."""
    model = extend(make(num_hidden_layers=6), group_size=16).train()
    checkpoint_blocks(model, free=1, keep=False, offload=every)
    calls = [block._gradient_checkpointing_func for block in find_blocks(model)]
    loss, _ = gradients(model)
    loss.backward()
    assert all(call._last is None for call in calls)


@pytest.mark.parametrize("broken", range(6))
def test_a_forward_that_fails_leaves_nothing_behind(without_gpu, broken):
    model = extend(make(num_hidden_layers=6), group_size=16, lora_dropout=0.2).train()
    loss, grads = gradients(model)
    loss.backward()
    plain = grads()
    checkpoint_blocks(model, keep=False, offload=3)
    blocks = find_blocks(model)

    def fail(module, args):
        raise torch.OutOfMemoryError("out of memory")

    hook = blocks[broken].mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(model)
    assert all(block._gradient_checkpointing_func._last is None for block in blocks)
    hook.remove()
    loss, grads = gradients(model)
    loss.backward()
    for name, grad in grads().items():
        torch.testing.assert_close(grad, plain[name], msg=name)

"""A step that runs out of memory: the switch that is named, and the training that goes on."""

import gc
import re
import weakref
from itertools import product

import pytest
import torch

from peft_longlora.memory import checkpoint_blocks, explain_out_of_memory
from peft_longlora.memory.advice import state_of
from tests.helpers.every_config import tiny_model
from tests.helpers.held_bytes import Held
from tests.helpers.tiny import EXPERTS, IDS, extend, make


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr("peft_longlora.memory.advice.kernels_of", lambda model: ("Liger",))
    return extend(make(num_hidden_layers=4), group_size=16).train()


def message(model) -> str:
    with pytest.raises(torch.OutOfMemoryError) as caught, explain_out_of_memory(model):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "Tried to allocate 2.00 GiB" in str(caught.value)
    return str(caught.value)


def test_the_switches_come_one_after_the_other(model):
    assert "No block is checkpointed" in message(model)
    seen = []
    for options in (
        dict(free=2),
        dict(),
        dict(tile_tokens=40),
        dict(tile_tokens=40, offload=True),
        dict(tile_tokens=40, offload=True, keep=False),
    ):
        checkpoint_blocks(model, **options)
        seen.append(message(model))
    named = ("free=0", "tile_tokens=4096", "offload=True", "keep=False", "Every switch is on")
    assert all(name in text for name, text in zip(named, seen, strict=True))


def test_what_is_on_is_seen(model):
    for every in (1, 2, 3):
        checkpoint_blocks(model, free=1, keep=1, keep_in_host=1, offload=every, tile_tokens=40)
        assert state_of(model) == dict(
            checkpointed=True, free=1, keep=1, keep_in_host=1, offload=every, tile_tokens=40, whole=0
        )


SWITCHES = [
    dict(free=free, keep=keep, keep_in_host=in_host, offload=offload, tile_tokens=tokens)
    for free, keep, in_host, offload, tokens in product((0, 2), (0, 1), (0, 1), (False, True, 2), (None, 40))
]


def test_the_call_that_is_named_needs_less_and_leaves_the_other_switches(model):
    """Of every combination, one switch after the other until none is left."""
    calls = []
    for options in SWITCHES:
        checkpoint_blocks(model, **options)
        left = 4
        while (
            found := re.search(r"call peft_longlora\.memory\.(checkpoint_blocks\(.+?\))[,.]", message(model))
        ) and left:
            before = state_of(model)
            eval(found[1], dict(checkpoint_blocks=checkpoint_blocks, model=model))
            after = state_of(model)
            changed = {name for name in after if after[name] != before[name]} - {"whole"}
            assert len(changed) == 1 and bytes_of(after) < bytes_of(before), (options, found[1])
            calls.append(found[1])
            left -= 1
        assert "Every switch is on" in message(model)
    assert {"free=0", "keep=False", "offload=True", "offload=2", "tile_tokens=4096", "tile_tokens=40"} <= {
        word.strip(" ()") for call in calls for word in call.split(",")
    }


def bytes_of(on):
    """Of a token on the GPU, in widths of the model: four blocks, feed-forward layers of three and a half widths."""
    inputs, whole = 1 if on["offload"] else 4 - on["free"], 0 if on["tile_tokens"] else 3 * 3.5
    return inputs + on["keep"] + 14 * on["free"] + whole


@pytest.mark.parametrize("names", [None, "all-linear"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_switch_that_is_on_or_has_no_effect_is_not_named(monkeypatch, family, names):
    """Feed-forward layers with adapters have tiles too; a mixture of experts has none."""
    monkeypatch.setattr("peft_longlora.memory.advice.kernels_of", lambda model: ("Liger",))
    targets = dict(target_modules=names) if names else {}
    model = extend(make(family, **EXPERTS.get(family, {})), group_size=16, **targets).train()
    checkpoint_blocks(model)
    assert ("tile_tokens=4096" in message(model)) is (family == "llama")
    checkpoint_blocks(model, tile_tokens=40)
    assert "call peft_longlora.memory.checkpoint_blocks(model, offload=True" in message(model)
    assert ("tile_tokens=40" in message(model)) is (family == "llama")


def test_a_wrapped_model_has_the_switches_of_its_own(model):
    """DDP and nn.DataParallel hold it."""
    wrapped = torch.nn.DataParallel(model)
    for options in (dict(free=2), dict(), dict(tile_tokens=40)):
        checkpoint_blocks(model, **options)
        assert message(wrapped) == message(model)
    checkpoint_blocks(wrapped, free=1, tile_tokens=None)
    assert "1 blocks keep everything" in message(model)


def test_no_switch_is_named_that_is_refused():
    model = tiny_model("jetmoe")  # transformers checkpoints none of its blocks
    with pytest.raises(ValueError, match="JetMoeForCausalLM has no blocks that transformers can checkpoint"):
        checkpoint_blocks(model)
    assert "cannot checkpoint the blocks of JetMoeForCausalLM: use shorter rows" in message(model)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("offload", [False, 2])
def test_training_goes_on_after_an_error(model, where, offload):
    """The next step is the one that another model, which had no error, takes."""
    other = extend(make(num_hidden_layers=4), group_size=16).train()
    checkpoint_blocks(model, offload=offload, tile_tokens=40, keep=False)
    runs_out = True

    def fail(*_):
        if runs_out:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    block = model.get_base_model().model.layers[2]
    add = block.mlp.down_proj.register_forward_hook if where == "forward" else block.register_full_backward_hook
    handle = add(fail)
    with pytest.raises(torch.OutOfMemoryError, match="The step does not fit"), explain_out_of_memory(model):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    runs_out = False
    handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())
    short = IDS[:, :48]
    losses = []
    for one in (model, other):
        loss = one(input_ids=short, labels=short, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("options", [dict(), dict(keep=False, offload=2, tile_tokens=40)], ids=str)
@pytest.mark.parametrize("calls", [3, 5])  # in the forward; in the backward, where a block is computed again
def test_an_error_that_is_kept_keeps_no_tensor_of_the_step(model, options, calls):
    """As a notebook keeps its last error: the memory must be free for a shorter row."""
    seen = []

    def stop(_module, given, _out):
        seen.append(1)
        if len(seen) == calls:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def step(ids):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    checkpoint_blocks(model, **options)
    for name, layer in model.named_modules():
        if name.endswith("q_proj.base_layer"):
            layer.register_forward_hook(stop)
    gc.collect()
    with Held() as held:
        for tensor in (IDS, *model.parameters(), *model.buffers()):
            held.add(tensor)
        before = held.now
        with pytest.raises(torch.OutOfMemoryError) as caught, explain_out_of_memory(model):
            step(IDS)
        # On a CPU autograd's queue keeps the nodes that were ready until the next backward.
        torch.ones(1, requires_grad=True).sum().backward()
        left = held.now - before
    assert len(seen) == calls and left < IDS.numel() * 32
    [where] = caught.value.__cause__.__notes__
    assert "in step" in where and "in stop" in where


def test_an_error_that_is_kept_does_not_keep_the_model():
    model = extend(make())
    left = weakref.ref(model)
    try:
        with explain_out_of_memory(model):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    except torch.OutOfMemoryError as error:
        kept = error
    del model
    gc.collect()
    assert left() is None and "does not fit" in str(kept)


def test_the_notes_of_an_error_stay():
    error = torch.OutOfMemoryError("CUDA out of memory.")
    error.__notes__ = ["in step 7"]  # what `add_note` sets in Python 3.11 and later
    with pytest.raises(torch.OutOfMemoryError) as caught, explain_out_of_memory(extend(make())):
        raise error
    assert len(caught.value.__cause__.__notes__) == 2 and error.__notes__[0] == "in step 7"


def test_an_error_that_came_while_another_was_handled_keeps_no_tensor(model):
    """Neither by the frames of the other one, as where a kernel is tried and the next one runs out of memory."""
    gc.collect()
    with Held() as held:
        before = held.now

        def tried():
            big = torch.ones(1000, 1000)
            raise RuntimeError(f"no kernel for {big.shape}")

        with pytest.raises(torch.OutOfMemoryError) as caught, explain_out_of_memory(model):
            try:
                tried()
            except RuntimeError:
                raise torch.OutOfMemoryError("CUDA out of memory.")  # noqa: B904
        assert held.now == before
    assert str(caught.value.__cause__.__context__).startswith("no kernel")

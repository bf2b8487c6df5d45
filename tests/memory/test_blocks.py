"""Checkpointed and free blocks: the same step, and attention computed once."""

import copy
from types import MethodType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING

from peft_longlora.memory import checkpoint_blocks
from peft_longlora.memory.blocks import find_blocks
from peft_longlora.memory.keep import is_attention
from tests.helpers.every_config import tiny_model
from tests.helpers.tiny import IDS, extend, make


class _Count(TorchDispatchMode):
    """Counts forwards of attention, and matrix products."""

    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.attention += is_attention(function)
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return function(*args, **(kwargs or {}))


def step(model, in_half=False, **more):
    model.train()
    model.zero_grad()
    torch.manual_seed(3)  # dropout
    with _Count() as counted:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_half):
            loss = model(input_ids=IDS.to(model.device), labels=IDS.to(model.device), use_cache=False, **more).loss
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        dict(free=0, keep=False),
        dict(free=0),
        dict(free=1),
        dict(free=2),
        dict(free=1, tile_tokens=40),
        dict(free=0, keep=False, offload=True, tile_tokens=14),
        dict(free=0, keep=False, offload=2),
        dict(free=0, keep=False, offload=3),
        dict(keep_in_host=1, keep=1, offload=3, tile_tokens=40),
        dict(free=1, keep=1, keep_in_host=1, offload=True, tile_tokens=40),
        dict(keep_in_host=3),
        dict(keep=1, keep_in_host=2, offload=2, tile_tokens=40),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_loss_and_gradients_are_those_of_the_plain_step(dtype, options, device, monkeypatch):
    monkeypatch.setattr("peft_longlora.memory.places.LEAST_BYTES", 1)
    model = extend(make(dtype=dtype, num_hidden_layers=3), group_size=16, lora_dropout=0.2).to(device)
    loss, grads, _ = step(model)
    checkpoint_blocks(model, **options)
    again, found, _ = step(model)
    assert torch.equal(loss, again) and grads.keys() == found.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, msg=name)


OPTIONS = [dict(), dict(keep=False), dict(keep=False, offload=True), dict(keep=False, offload=2)]
OPTIONS += [dict(keep=False, offload=3), dict(free=1, keep=1, offload=2, tile_tokens=40)]
KINDS = {
    "gpt_oss": {},
    "gemma3_text": {},
    "gemma4_text": dict(rope_type="linear"),
    "qwen3_5_text": {},
    "qwen3_next": {},
}
KINDS |= {"lfm2": {}, "zamba2": {}}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", [name for name in KINDS if name in CONFIG_MAPPING])
def test_layers_with_windows_states_and_shared_keys(name, options, monkeypatch):
    """Gemma 4's blocks also get a part of the embeddings each. In a hybrid, layers with a state are blocks too."""
    monkeypatch.setattr("peft_longlora.memory.places.LEAST_BYTES", 1)
    model = extend(tiny_model(name), group_size=16, **KINDS[name])
    assert len(find_blocks(model)) == model.config.num_hidden_layers
    for call in (dict(), dict(position_ids=torch.arange(IDS.shape[1]).remainder(40).expand(IDS.shape))):
        checkpoint_blocks(model, free=len(find_blocks(model)))
        loss, grads, _ = step(model, **call)
        checkpoint_blocks(model, **options)
        again, found, _ = step(model, **call)
        assert torch.equal(loss, again) and grads.keys() == found.keys()
        for one, grad in grads.items():
            torch.testing.assert_close(found[one], grad, msg=one)


def test_under_autocast():
    """As the Trainer computes with bf16=True: what is computed again is computed in the same precision."""
    model = extend(make(num_hidden_layers=4), group_size=16)
    loss, grads, _ = step(model, in_half=True)
    checkpoint_blocks(model, offload=2, keep=1)
    again, found, _ = step(model, in_half=True)
    assert torch.equal(loss, again) and not torch.equal(loss, step(model)[0])
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_what_is_computed_a_second_time():
    model = extend(make(), group_size=16)
    *_, plain = step(model)
    counts = {}
    for free, keep in [(0, False), (0, True), (1, True), (2, True)]:
        checkpoint_blocks(model, free=free, keep=keep)
        *_, counts[free, keep] = step(model)
    assert plain.attention > 0
    assert counts[0, False].attention == 2 * plain.attention  # computed again
    assert counts[0, True].attention == counts[1, True].attention == plain.attention
    assert counts[0, True].products > counts[1, True].products > counts[2, True].products == plain.products


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_a_block_in_a_block_is_not_computed_a_third_time(name):
    """Their hybrid layers hold a layer that transformers can checkpoint by itself."""
    model = extend(tiny_model(name), group_size=16)
    *_, plain = step(model)
    with _Count() as forward:
        model(input_ids=IDS, use_cache=False)
    checkpoint_blocks(model, keep=False)
    *_, again = step(model)
    assert plain.products < again.products <= plain.products + forward.products
    checkpoint_blocks(model, free=len(find_blocks(model)))
    *_, free = step(model)
    assert free.products == plain.products


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt_neox", "mixtral"])
def test_blocks_are_found_in_order(model_type):
    model = make(model_type)
    blocks = find_blocks(extend(model) if model_type == "llama" else model)
    assert len(blocks) == model.config.num_hidden_layers
    assert [next(m.layer_idx for m in b.modules() if hasattr(m, "layer_idx")) for b in blocks] == [0, 1]


@pytest.mark.parametrize("keep", [False, True])
def test_tiles_in_a_checkpointed_block_cost_no_forward_more(keep):
    """The second forward of a block ends before its feed-forward layer, whose tiles then run it."""
    model = extend(make(), group_size=16)
    counts = []
    for tokens in (None, 40):
        checkpoint_blocks(model, keep=keep, tile_tokens=tokens)
        with FlopCounterMode(display=False) as counted:
            step(model)
        counts.append(counted.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="keep=2 and keep_in_host=1 are not numbers of blocks that add up to 0 to 2"):
        checkpoint_blocks(make(), keep=2, keep_in_host=1)
    with pytest.raises(ValueError, match="free=3 is outside 0 to 2"):
        checkpoint_blocks(make(), free=3)
    for wrong in (-1, 2.0, "all"):
        with pytest.raises(ValueError, match=rf"offload={wrong!r} must be True or False, or n"):
            checkpoint_blocks(make(), offload=wrong)
    for name, *values in (("free", True, 1.0, None), ("keep", 1.0, "all"), ("keep_in_host", True, 1.5)):
        for wrong in values:
            with pytest.raises(ValueError, match=rf"{name}={wrong!r} must be a whole number"):
                checkpoint_blocks(make(), **{name: wrong})
    for wrong in (2.5, True, "4"):
        model = make()
        with pytest.raises(ValueError, match=rf"tile_tokens={wrong!r} must be a whole number of tokens, or None"):
            checkpoint_blocks(model, tile_tokens=wrong)
        assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="tile_tokens=0 must be 1 or more tokens"):
        checkpoint_blocks(make(), tile_tokens=0)
    with pytest.raises(ValueError, match="no blocks that transformers can checkpoint"):
        checkpoint_blocks(torch.nn.Linear(2, 2))


def test_inputs_that_do_not_wait_are_computed_by_the_blocks_before():
    model = extend(make(num_hidden_layers=6), group_size=16)
    *_, plain = step(model)
    checkpoint_blocks(model, keep=False)
    *_, once = step(model)
    checkpoint_blocks(model, keep=False, offload=2)
    *_, twice = step(model)
    checkpoint_blocks(model, keep=False, offload=3)
    *_, thrice = step(model)
    # 6 blocks forward, then 6 again; every second input: 3 of them a third time; every third: 1 + 2 in both threes
    assert once.attention == 2 * plain.attention
    assert (twice.attention, thrice.attention) == (2.5 * plain.attention, 3 * plain.attention)


@pytest.mark.parametrize("targets", [{}, dict(target_modules="all-linear")], ids=str)
def test_a_tile_is_all_that_the_inner_width_is_there_for(targets):
    """In a batch of two rows half of a tile's tokens are of each row. Layers with adapters have tiles too."""
    model = extend(make(), group_size=16, **targets)
    widest = []
    for block in find_blocks(model):
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args: widest.append(args[0].shape[1]))
    checkpoint_blocks(model, tile_tokens=40)
    step(model)
    assert set(widest) == {20, 16}  # of 96 tokens
    widest.clear()
    for block in find_blocks(model):  # as Liger does
        block.mlp.forward = MethodType(type(block.mlp).forward, block.mlp)
    step(model)
    assert set(widest) == {20, 16}
    widest.clear()
    checkpoint_blocks(model, offload=2, tile_tokens=40)  # also if a block is computed again for the one after it
    step(model)
    assert set(widest) == {20, 16}
    widest.clear()
    for block in find_blocks(model):
        del block.mlp.forward
    checkpoint_blocks(model)  # whole rows again
    step(model)
    assert set(widest) == {96}
    assert type(find_blocks(model)[0].mlp).__mro__[1] is torch.nn.Module


def test_a_tiled_model_evaluates_whole_and_is_copied():
    model = extend(make(), group_size=16).eval()
    logits = model(IDS).logits
    checkpoint_blocks(model, tile_tokens=40)
    assert torch.equal(model.eval()(IDS).logits, logits)
    copied = copy.deepcopy(model)
    assert find_blocks(copied)[0].mlp.tile_tokens == 40
    assert torch.equal(step(copied)[0], step(model)[0])


@pytest.mark.gpu
def test_offloaded_inputs_leave_the_gpu_and_come_back(monkeypatch):
    sizes = dict(hidden_size=512, intermediate_size=512, num_hidden_layers=16, num_attention_heads=8)
    model = extend(make(dtype=torch.bfloat16, **sizes, num_key_value_heads=8), context_length=16384).cuda().train()
    ids = torch.randint(97, (1, 16384), device="cuda")
    found = {}
    for offload in (False, True, 2, 3):
        checkpoint_blocks(model, keep=False, offload=offload)
        grads = []
        for _ in range(3):  # host buffers are used again
            torch.cuda.reset_peak_memory_stats()
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        found[offload] = torch.cuda.max_memory_allocated(), grads
    inputs = 16 * 16384 * 512 * 2
    plain, *others = found[False][1]
    names = [name for name, grad in plain.items() if grad.norm() > 0]

    def distance(grads):  # sums of atomic additions have another order in each run, without offloading too
        return {name: ((grads[name] - plain[name]).norm() / plain[name].norm()).item() for name in names}

    noise = max(max(distance(one).values()) for one in others)
    assert noise < 0.05
    for offload in (True, 2, 3):
        for again in found[offload][1]:
            assert max(distance(again).values()) <= 3 * noise + 1e-3
        assert found[False][0] - found[offload][0] > 0.5 * inputs


@pytest.mark.parametrize("offload", [1, 2, 3])
def test_nothing_is_held_once_the_backward_is_over(offload):
    model = extend(make(num_hidden_layers=3), group_size=16)
    checkpoint_blocks(model, keep=False, offload=offload)
    step(model)
    for block in find_blocks(model):
        held = block._gradient_checkpointing_func._last
        # The last block is followed by none, and each that is followed has handed its input on.
        assert held is None

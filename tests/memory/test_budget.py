"""What a plan counts and fills: precisions of what is trained, one GPU, and a late gradient."""

import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from peft_longlora.memory import checkpoint_blocks, fit, fit_memory, peaks
from peft_longlora.memory.blocks import find_blocks
from peft_longlora.memory.plan import MEANS, fill
from tests.helpers.measured_gpu import GIB, NAMED, Machine, plan
from tests.helpers.tiny import extend, make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_optimizer_has_the_precision_of_what_is_trained(monkeypatch, dtype):
    """All weights in half precision have moments, and gradients, in half precision."""
    model = make(dtype=dtype)
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
    Machine(monkeypatch)
    once, summed = (fit_memory(model, 60_000, NAMED, accumulates=value) for value in (False, True))
    assert once.fixed == pytest.approx(1e8 + moments, abs=2)
    assert summed.fixed - once.fixed == gradients
    assert once.late == model.get_input_embeddings().weight.nbytes


def test_a_model_on_several_devices_is_refused():
    """As device_map="auto" places it: one GPU's peak says nothing about the other's."""
    places = [SimpleNamespace(device=torch.device("cuda", number)) for number in (0, 1, 0)]
    model = SimpleNamespace(parameters=lambda: iter(places))
    with pytest.raises(ValueError, match="The model is on cuda:0, cuda:1: fit_memory measures one GPU"):
        fit._check(model, places[0].device, 8192)
    with pytest.raises(ValueError, match="Call fit_memory before it is wrapped"):
        fit.check_alone(torch.nn.DataParallel(make()))


def fastest(chosen):
    """The least work of all numbers of blocks that fit."""
    numbers = [(free, keep, host) for free, keep, host in product(range(9), repeat=3) if free + keep + host <= 8]
    others = (replace(chosen, free=free, keep=keep, keep_in_host=host) for free, keep, host in numbers)
    return min(one.work for one in others if one.fits and (one.means or not one.keep_in_host))


@pytest.mark.parametrize("budget", [GIB // 2, GIB // 2 + 10**7, GIB])
@pytest.mark.parametrize("means", [MEANS[0], MEANS[2]], ids=str)
def test_a_late_gradient_takes_no_room_from_attention(budget, means):
    """It is made when what blocks keep is gone, so the two need not fit together."""
    chosen = fill(plan(500, budget, 17 * 10**6, means, late=GIB // 4, free_bytes=400_000))
    assert chosen.fits and chosen.work == fastest(chosen)


def test_attention_waits_in_the_host_where_none_fits_on_the_gpu():
    """While the loss is at the peak nothing has to arrive."""
    budget, host = GIB // 4 + 1000 * (60_000 + 3 * 40_000), 1000 * (5 * 4000 + 2 * 8000)
    chosen = fill(plan(1000, budget, host, MEANS[2]))
    assert (chosen.free, chosen.keep, chosen.keep_in_host) == (3, 0, 2) and chosen.work == fastest(chosen)


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("means", [dict(), dict(keep=False, offload=2), dict(free=2)], ids=str)
def test_the_peak_is_read_before_and_after_the_blocks(monkeypatch, embeddings, means):
    """What the loss and the embeddings' gradient take must not hide what the blocks of a short step need."""
    order = []
    monkeypatch.setattr(peaks.torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(peaks.torch.cuda, "reset_peak_memory_stats", lambda device: order.append("reset"))
    monkeypatch.setattr(peaks.torch.cuda, "max_memory_allocated", lambda device: order.append("read") or len(order))
    monkeypatch.setattr(peaks.torch.random, "fork_rng", lambda *_, **__: nullcontext())
    model = extend(make(num_hidden_layers=3), train_embeddings=embeddings)
    checkpoint_blocks(model, **means)
    for number, block in enumerate(find_blocks(model)):
        first = next(p for p in block.parameters() if p.requires_grad)
        first.register_post_accumulate_grad_hook(lambda _, number=number: order.append(number))
    for parameter in model.get_input_embeddings().parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _: order.append("embeddings"))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    find_blocks(model.train())[1].self_attn.eval()  # as its user wants it
    modes = [module.training for module in model.modules()]
    found = peaks.measure_peaks(model, 64, lambda model, ids: model(input_ids=ids, labels=ids).loss)
    assert found == peaks.Peaks(2, 7, 9 + embeddings)  # how many stood in the order when it was read
    blocks = ["reset", "read", "reset", 2, 1, 0, "read", "reset"]
    assert order == [*blocks, *["embeddings"] * embeddings, "read", "reset"]
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("budget", [GIB // 2, 3 * GIB])
def test_the_loss_is_the_peak_of_short_rows_and_blocks_that_of_long_ones(budget):
    """A token needs 60 kB when the loss is computed and 100 kB in the blocks."""
    fixed = GIB // 8
    longest = plan(1000, budget, loss_fixed=fixed).longest
    at_loss, in_blocks = (budget - GIB // 4 - fixed) // 60_000, (budget - GIB // 4) // 100_000
    assert longest == min(at_loss, in_blocks) and (at_loss < in_blocks) is (budget < GIB)
    assert plan(longest, budget, loss_fixed=fixed).fits and not plan(longest + 1, budget, loss_fixed=fixed).fits


@pytest.mark.parametrize("options", [dict(), dict(free=3, keep=2), dict(loss_fixed=GIB // 8), dict(keep_in_host=2)])
def test_the_rows_of_the_table_add_up_to_the_peak(options):
    one = plan(**options)
    rows = re.findall(r"^(.+?) +(-?[\d.]+) GiB$", str(one), flags=re.MULTILINE)
    *parts, (name, peak) = rows[: next(n for n, (row, _) in enumerate(rows) if row == "budget")]
    assert name == "peak expected" and sum(float(size) for _, size in parts) == pytest.approx(float(peak), abs=0.03)
    assert float(peak) == pytest.approx(one.peak / GIB, abs=0.01)

"""Forwards whose backward waits: a layer is recomputed with the documents of its own forward, in every order."""

import gc
import threading

import pytest
import torch

from peft_longlora.attention.pending import Forward, Forwards
from peft_longlora.attention.settings import settings_of
from tests.attention.test_states import POSITIONS, ROW, configured

OTHER = torch.cat([torch.arange(n) for n in (20, 12, 1, 30, 7)])[None]
CALLS = [dict(input_ids=ROW, position_ids=x, use_cache=False) for x in (POSITIONS, OTHER, None)]


def loss(model, call):
    return model(**call).logits.sin().sum()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
def test_forwards_wait_in_any_number_and_end_in_any_order(reentrant):
    """The same tokens in other documents; also a forward whose loss nobody uses."""
    model, wanted = configured("lfm2"), []
    for call in CALLS:
        model.zero_grad()
        loss(model, call).backward()
        wanted.append(gradient(model).clone())
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2 < (wanted[0] - wanted[2]).abs().max()
    checkpointed(model, reentrant)
    model.zero_grad()
    first, _dropped = loss(model, CALLS[0]), loss(model, CALLS[1])
    first.backward()
    torch.testing.assert_close(gradient(model), wanted[0], rtol=1e-3, atol=1e-3)
    model.zero_grad()
    waiting = [loss(model, CALLS[n % 3]) for n in range(10)]
    for one in waiting:
        one.backward()
    total = sum(wanted[n % 3] for n in range(10))
    torch.testing.assert_close(gradient(model), total, rtol=1e-3, atol=1e-2)


def test_a_forward_is_known_as_long_as_its_graph():
    model = configured("lfm2")
    checkpointed(model, False)
    out = loss(model, CALLS[0])
    loss(model, CALLS[1])
    loss(model, CALLS[2])
    gc.collect()
    known = settings_of(model.model.layers[1].self_attn).states.forwards._known
    assert sum(one() is not None for one in known) == 2  # the first, and the last, which the inputs note
    out.backward()


def test_what_may_be_one_of_several_is_refused():
    forwards, kept = Forwards(), []
    for plan in (object(), object()):
        kept.append(Forward(plan, True, (2, 5), None))
        forwards.add(kept[-1])

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            assert forwards.of_recomputation((2, 6)) is None
            forwards.of_recomputation((2, 5))

    assert forwards.of_recomputation((2, 5)) is None  # no backward: a layer that is called by hand
    with pytest.raises(RuntimeError, match=r"which of 2 forwards of 2 x 5 tokens.*backward\(\) before the next"):
        Again.apply(torch.ones((), requires_grad=True)).backward()


@torch.no_grad()
def test_an_interrupted_forward_leaves_nothing():
    model = configured("lfm2")
    wanted = model(**CALLS[1]).logits
    for inner in (model.model.layers[1], model.model.layers[0].conv.in_proj):

        def stop(*_):
            raise KeyboardInterrupt

        handle = inner.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(**CALLS[0])
        handle.remove()
        hidden = model.model(**CALLS[1]).last_hidden_state  # a module inside the one that was interrupted
        torch.testing.assert_close(model.lm_head(hidden), wanted)
        torch.testing.assert_close(model(**CALLS[1]).logits, wanted)


@torch.no_grad()
def test_threads_share_a_model():
    """One waits in the middle of its forward until the other has made a whole one."""
    model = configured("lfm2")
    wanted = [model(**call).logits for call in CALLS[:2]]
    inside, over, found = threading.Event(), threading.Event(), []

    def wait(*_):
        if threading.current_thread() is worker:
            inside.set()
            assert over.wait(20)

    @torch.no_grad()
    def work():
        found.append(model(**CALLS[0]).logits)

    model.model.layers[0].conv.in_proj.register_forward_pre_hook(wait)
    worker = threading.Thread(target=work)
    worker.start()
    assert inside.wait(20)
    torch.testing.assert_close(model(**CALLS[1]).logits, wanted[1])
    over.set()
    worker.join()
    torch.testing.assert_close(found[0], wanted[0])


@torch.no_grad()
def test_a_cache_that_the_model_makes_itself():
    """Evaluation makes one by default: documents stay apart, and nothing goes on from it."""
    model = configured("lfm2").eval()
    out = model(input_ids=ROW, position_ids=POSITIONS)
    torch.testing.assert_close(out.logits, model(**CALLS[0]).logits)
    with pytest.raises(ValueError, match="a row of several documents, so it holds no state"):
        model(input_ids=ROW[:, :1], past_key_values=out.past_key_values)
    out = model(input_ids=ROW[:, :9])  # a row of one document: the cache goes on
    torch.testing.assert_close(
        model(input_ids=ROW[:, 9:10], past_key_values=out.past_key_values).logits,
        model(input_ids=ROW[:, :10], use_cache=False).logits[:, 9:],
    )

"""Token losses without the logits of the window: equal to those of the whole, on bare, PEFT and peculiar models."""

import pytest
import torch
import torch.nn.functional as F

from peft_longlora.eval.losses import TokenLosses
from tests.helpers.answering_models import Bigrams
from tests.helpers.tiny import IDS, extend, make


def plain(model, inputs, targets):
    with torch.no_grad():
        logits = model(input_ids=inputs[None], use_cache=False).logits[0].float()
    return F.cross_entropy(logits[: len(targets)], targets, reduction="none")


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("gemma2", dict(final_logit_softcapping=3.0, head_dim=8)),  # caps what comes out of the output embeddings
        ("granite", dict(logits_scaling=4.0)),  # divides it
        ("cohere", dict(logit_scale=0.25)),
    ],
)
@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_equal_to_the_losses_of_the_whole_window(model_type, changes, chunk_size):
    model = make(model_type, **changes)
    for n in (64, 63, 1):
        losses = TokenLosses(model, chunk_size)(IDS[0, :64], IDS[0, 1 : 1 + n])
        assert torch.allclose(losses, plain(model, IDS[0, :64], IDS[0, 1 : 1 + n]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_losses_may_be_waited_for_later(device):
    model = make().to(device)
    losses, windows = TokenLosses(model, 10), [IDS[0, start : start + 33] for start in range(0, 60, 5)]
    waits = [losses.start(ids[:-1], ids[1:]) for ids in windows]
    for wait, ids in zip(reversed(waits), reversed(windows), strict=True):  # whatever the order, and more than once
        assert wait().device.type == "cpu"
        assert torch.equal(wait(), losses(ids[:-1], ids[1:]).cpu())


def test_a_peculiar_model_is_told_from_a_plain_one():
    for kind, is_plain, changes in (("llama", True, {}), ("granite", False, dict(logits_scaling=4.0))):
        losses = TokenLosses(make(kind, **changes))
        losses(IDS[0, :8], IDS[0, 1:9])
        assert losses._is_plain is is_plain


@pytest.mark.parametrize("settings", [{}, dict(target_modules=["q_proj", "lm_head"])])
def test_an_adapters_own_embeddings_count(settings):
    model = extend(make(), **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    losses = TokenLosses(model, 10)(IDS[0, :95], IDS[0, 1:])
    assert torch.allclose(losses, plain(model, IDS[0, :95], IDS[0, 1:]), atol=1e-5)
    with model.disable_adapter():
        base = TokenLosses(model, 10)(IDS[0, :95], IDS[0, 1:])
    assert not torch.allclose(losses, base, atol=1e-3)


def test_logits_exist_for_one_chunk_at_a_time():
    model = Bigrams(torch.full((4, 4), 0.25))
    sizes = []
    model.head.register_forward_hook(lambda module, arguments, out: sizes.append(out.shape[1]))
    ids = torch.randint(4, (1000,))
    TokenLosses(model, 50)(ids[:-1], ids[1:])
    assert max(sizes) == 50 and model.largest == 1, "the model's own logits are those of the last token"


def test_nothing_is_left_on_the_model():
    model = make("granite", logits_scaling=4.0)
    TokenLosses(model)(IDS[0, :8], IDS[0, 1:9])
    assert not model.get_output_embeddings()._forward_pre_hooks
    with pytest.raises(IndexError):
        TokenLosses(model)(torch.tensor([10**6]), torch.tensor([1]))
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_without_output_embeddings_is_refused():
    with pytest.raises(NotImplementedError, match="LlamaModel names no output embeddings"):
        TokenLosses(make().model)

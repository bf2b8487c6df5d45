"""The low-rank product in half precision: against float64, against PEFT's own float32 path, and when it stays out."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from peft_longlora.adapter import lowrank
from tests.helpers.tiny import IDS, extend, make

SHAPE = (2, 24, 32)  # (B, S, in)


def operands(dtype, out=48, rank=4):
    x = torch.randn(SHAPE).to(dtype)
    result = torch.randn(*SHAPE[:2], out).to(dtype)
    a, b = torch.randn(rank, SHAPE[2]) / 6, torch.randn(out, rank) / 2
    return result, x, a, b


def gradients(function, result, x, a, b, grad):
    """The output, and the gradients of all four operands."""
    leaves = [y.detach().clone().requires_grad_() for y in (result, x, a, b)]
    out = function(leaves[0] * 1, *leaves[1:])  # times 1: what is written into must be no leaf
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [2.0, 0.37])
def test_values_and_gradients_are_those_of_float64_within_rounding(dtype, scaling):
    inputs = operands(dtype)
    grad = torch.randn(*SHAPE[:2], 48).to(dtype)
    found = gradients(lambda r, x, a, b: lowrank.add_low_rank(r, x, a, b, scaling), *inputs, grad)
    exact = gradients(lambda r, x, a, b: r + scaling * (x @ a.T) @ b.T, *(y.double() for y in inputs), grad.double())
    assert [y.dtype for y in found] == [dtype, dtype, dtype, torch.float32, torch.float32]
    rounding = torch.finfo(dtype).eps
    for mine, truth in zip(found, exact, strict=True):
        assert (mine.double() - truth).norm() < 2 * rounding * truth.norm()


def test_a_view_is_not_written_into():
    result, x, a, b = operands(torch.bfloat16)
    whole = torch.cat((result, result))
    view = whole[: SHAPE[0]]
    out = lowrank.add_low_rank(view, x, a, b, 1.0)
    assert torch.equal(whole[: SHAPE[0]], result) and not torch.equal(out, result)


def losses_and_gradients(model):
    model.train()
    torch.manual_seed(5)  # dropout
    loss = model(input_ids=IDS, labels=IDS).loss
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def stir(model):
    """LoRA's B is 0 at first, and then nothing that A does shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


@pytest.fixture
def plain(monkeypatch):
    """Switches PEFT's own path on."""

    def switch():
        monkeypatch.setattr(lowrank, "is_plain", lambda *_: False)

    return switch


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"target_modules": "all-linear"}, {"train_norms": False}],
    ids=str,
)
def test_a_step_is_that_of_pefts_float32_path_within_rounding(settings, plain, monkeypatch):
    model = stir(extend(make(dtype=torch.bfloat16), **settings))
    used = []
    real = lowrank.add_low_rank
    monkeypatch.setattr(lowrank, "add_low_rank", lambda *a: used.append(1) or real(*a))
    loss, grads = losses_and_gradients(model)
    assert used
    exact_model = stir(extend(make(dtype=torch.float32), **settings))
    exact_model.load_state_dict(model.state_dict())  # the same rounded numbers
    exact_loss, exact = losses_and_gradients(exact_model)
    count = len(used)
    plain()
    peft_loss, theirs = losses_and_gradients(model)
    assert len(used) == count and grads.keys() == theirs.keys() == exact.keys()

    def distance(of):
        return {n: ((of[n].float() - exact[n]).norm() / exact[n].norm().clamp(min=1e-6)).item() for n in exact}

    mine, stock = distance(grads), distance(theirs)
    # bfloat16 hidden states make both inexact: this path must not add to it.
    assert sum(mine.values()) < 1.2 * sum(stock.values()), (mine, stock)
    assert abs(loss - exact_loss) < 2 * abs(peft_loss - exact_loss) + 0.02


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_gives_the_same_gradients(use_reentrant):
    model = stir(extend(make(dtype=torch.bfloat16)))
    loss, grads = losses_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    again, recomputed = losses_and_gradients(model)
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        torch.testing.assert_close(recomputed[name], grad, msg=name)


class _Largest(TorchDispatchMode):
    """Notes the float32 tensors that operators make, as large as `tokens` times `width` or larger."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32 and x.numel() >= self.size:
                self.found.append((str(function), tuple(x.shape)))
        return out


def test_no_projection_makes_a_float32_tensor_as_long_as_the_row(plain):
    model = stir(extend(make(dtype=torch.bfloat16)))
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer) and hasattr(m, "lora_A"))
    model.train()
    x = torch.randn(1, 512, 32, dtype=torch.bfloat16, requires_grad=True)
    for is_stock in (False, True):
        if is_stock:
            plain()
        with _Largest(512 * 32) as seen:
            layer(x).sum().backward()
        assert bool(seen.found) == is_stock, seen.found


def test_evaluation_is_pefts_own_bit_for_bit(plain):
    model = stir(extend(make(dtype=torch.bfloat16))).eval()
    with torch.no_grad():
        found = model(IDS).logits
        plain()
        assert torch.equal(model(IDS).logits, found)


@pytest.mark.parametrize("change", [dict(use_dora=True), dict(lora_bias=True)], ids=str)
def test_what_is_not_plain_lora_takes_pefts_path(change, monkeypatch):
    model = extend(make(dtype=torch.bfloat16, attention_bias=True), **change).train()
    monkeypatch.setattr(lowrank, "add_low_rank", None)  # a call fails
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_a_trained_bias_of_the_base_gets_a_gradient():
    model = extend(make(dtype=torch.bfloat16, attention_bias=True), bias="lora_only", train_norms=False).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    biases = [p for name, p in model.named_parameters() if name.endswith("_proj.base_layer.bias")]
    assert biases and all(p.requires_grad and p.grad.any() for p in biases)


def test_switched_off_and_merged_adapters_take_pefts_path(monkeypatch):
    model = stir(extend(make(dtype=torch.bfloat16))).train()
    monkeypatch.setattr(lowrank, "add_low_rank", None)
    with model.disable_adapter():
        model(input_ids=IDS)
    model.merge_adapter()
    with torch.no_grad():
        model(input_ids=IDS)


def test_hooks_on_the_little_layers_are_called():
    model = stir(extend(make(dtype=torch.bfloat16))).train()
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer) and hasattr(m, "lora_A"))
    called = []
    layer.lora_A["default"].register_forward_hook(lambda *_: called.append(1))
    model(input_ids=IDS)
    assert called


def test_two_active_adapters_add_up():
    model = stir(extend(make(dtype=torch.bfloat16), train_embeddings=False, train_norms=False))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    stir(model)
    model.base_model.set_adapter(["default", "other"])
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer) and hasattr(m, "lora_A")).train()
    x = torch.randn(1, 8, 32, dtype=torch.bfloat16)
    delta = sum(
        layer.scaling[n] * (x.float() @ layer.lora_A[n].weight.T) @ layer.lora_B[n].weight.T
        for n in ("default", "other")
    )
    exact = layer.base_layer(x).float() + delta
    assert (layer(x).float() - exact).norm() < 0.02 * exact.norm()


def test_a_model_is_copied_and_pickled_with_its_layers():
    model = stir(extend(make(dtype=torch.bfloat16)))
    loss, _ = losses_and_gradients(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again, _ = losses_and_gradients(copied)
        assert torch.equal(loss, again)
        layer = next(m for m in copied.modules() if isinstance(m, LoraLayer) and hasattr(m, "lora_A"))
        assert isinstance(layer, lowrank.HalfLowRank)


def test_stock_lora_layers_are_left_alone():
    model = get_peft_model(make(dtype=torch.bfloat16), LoraConfig(r=2))
    assert not any(isinstance(m, lowrank.HalfLowRank) for m in model.modules())

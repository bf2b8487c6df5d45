"""Trained copies of embeddings and norms learn in float32 under a bfloat16 model, and compute as the base's would."""

import copy
import pickle
import threading
from contextlib import nullcontext
from types import MethodType

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peft_longlora import LongLoraConfig
from peft_longlora.adapter.precision import keep_in_float32, round_to_half
from tests.helpers.configs import tiny_llama_config
from tests.helpers.every_config import tiny_model

TOKENS = torch.arange(3, 83).repeat(2, 1)


def bf16_llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(**changes)).to(torch.bfloat16)


def trained_copies(model):
    return {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}


@pytest.mark.parametrize(
    "module", [nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3)], ids=lambda m: type(m).__name__
)
def test_a_module_computes_the_same_and_its_gradients_are_float32(module):
    module = module.to(torch.bfloat16)
    x = torch.tensor([1, 5]) if isinstance(module, nn.Embedding) else torch.randn(3, 4, dtype=torch.bfloat16)
    expected = module(x)
    expected.float().pow(2).sum().backward()
    expected_grad = module.weight.grad.clone()
    module.weight.grad = None
    weight = module.weight
    keep_in_float32([module])
    assert module.weight is weight and weight.dtype == torch.float32
    out = module(x)
    out.float().pow(2).sum().backward()
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, expected_grad.float())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected) and twin.weight is not weight
    round_to_half(module)
    assert type(module).__mro__[0] in (nn.Embedding, nn.LayerNorm, nn.Linear)
    assert module.weight.dtype == torch.bfloat16 and torch.equal(module(x), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_adapter_computes_what_the_base_does(tied):
    base = bf16_llama(tie_word_embeddings=tied).eval()
    expected = base(TOKENS).logits
    model = get_peft_model(base, LongLoraConfig(r=4)).eval()
    assert all(p.dtype == torch.float32 for p in trained_copies(model).values())
    assert torch.equal(model(TOKENS).logits, expected)
    if tied:
        core = model.get_base_model()
        assert core.lm_head.weight is core.model.embed_tokens.weight


@pytest.mark.parametrize("model_type", ["nemotron_h", "zaya"])
def test_layers_that_ask_for_the_dtype_of_their_norm_compute_what_they_did(model_type):
    """They cast what they compute on to that dtype, so a norm kept in float32 would give them float32."""
    base = tiny_model(model_type).to(torch.bfloat16)
    ids = torch.arange(3, 83)[None]
    expected = base(ids).logits
    model = get_peft_model(base, LongLoraConfig(r=4, group_size=16))
    assert torch.equal(model(ids).logits, expected)
    norms = {n: p for n, p in trained_copies(model).items() if "norm" in n}
    assert len(norms) > 2 and all(p.dtype == torch.float32 for p in norms.values())
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in norms.values())


class Reads(nn.Module):
    """A layer that computes with a weight of another one, as kernels do that take it."""

    def forward(self, layer):
        return layer.weight


def test_who_computes_with_a_norms_weight_gets_what_the_norm_computes_with():
    """Who reads it between calls gets the trained one: to write into it, to optimise it, to look at its gradient."""
    model = get_peft_model(bf16_llama(), LongLoraConfig(r=4))
    core = model.get_base_model().model
    copied = core.norm.modules_to_save.default.weight
    with torch.no_grad():
        core.norm.weight.add_(torch.rand_like(copied))
    assert core.norm.weight is copied and not torch.equal(copied, torch.ones_like(copied))
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            seen = Reads()(core.norm)
        assert torch.equal(seen, copied.bfloat16()) and seen.dtype == torch.bfloat16
    seen.sum().backward()
    assert torch.equal(core.norm.weight.grad, torch.ones_like(copied))
    assert core.embed_tokens.weight is core.embed_tokens.modules_to_save.default.weight
    with model.disable_adapter():
        assert Reads()(core.norm) is core.norm.weight is core.norm.original_module.weight
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(Reads()(twin.get_base_model().model.norm), seen)
    plain = get_peft_model(bf16_llama().float(), LongLoraConfig(r=4)).get_base_model().model.norm
    assert Reads()(plain) is plain.weight is plain.modules_to_save.default.weight


def fused_forward(self, input_ids, labels):
    """As fused losses do: the output layer's matrix is read, and the layer is not called."""
    hidden = self.model(input_ids, use_cache=False).last_hidden_state[:, :-1]
    self.seen = self.lm_head.weight
    logits = (hidden @ self.seen.t()).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def chunked_forward(self, input_ids, labels):
    """Logits of some tokens at a time, computed again in the backward by a function that is no module's."""
    hidden, labels = self.model(input_ids, use_cache=False).last_hidden_state[:, :-1], labels[:, 1:]

    def loss_of(states, labels):
        logits = (states @ self.lm_head.weight.t()).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    parts = zip(hidden.split(16, 1), labels.split(16, 1), strict=True)
    return sum(checkpoint(loss_of, *part, use_reentrant=False) for part in parts) / labels.numel()


@pytest.mark.parametrize("trained", ["tied", "head"])
@pytest.mark.parametrize("how", ["read", "read in the backward"])
def test_a_loss_that_reads_the_output_layers_matrix_computes_as_the_layer_does(trained, how):
    """Liger's and TRL's losses do, and bfloat16 states times a float32 matrix is an error of torch."""
    changes = dict(tie_word_embeddings=trained == "tied", num_hidden_layers=1)
    more = {} if trained == "tied" else dict(modules_to_save=["lm_head"])
    model = get_peft_model(bf16_llama(**changes), LongLoraConfig(r=4, **more)).train()
    core, found = model.get_base_model(), []
    copied = core.lm_head.modules_to_save.default.weight
    for loss in (
        lambda: core(TOKENS, labels=TOKENS, use_cache=False).loss,
        lambda: core(input_ids=TOKENS, labels=TOKENS),
    ):
        if found:
            core.forward = MethodType(chunked_forward if how == "read in the backward" else fused_forward, core)
        value = loss()
        value.backward()
        found.append((value.item(), {n: p.grad.clone() for n, p in trained_copies(model).items()}))
        model.zero_grad()
    (plain, plain_grads), (fused, fused_grads) = found
    assert fused == pytest.approx(plain, rel=1e-3)
    assert all(grad.dtype == torch.float32 for grad in fused_grads.values())
    for name, grad in plain_grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=0.05, atol=0.02 * grad.abs().max().item(), msg=name)
    if how == "read":
        assert core.seen.dtype == torch.bfloat16 and torch.equal(core.seen, copied.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):  # it rounds by itself, and the gradient is summed in float32
        assert core(input_ids=TOKENS, labels=TOKENS).item() == pytest.approx(plain, rel=1e-3)
    if how == "read":
        assert core.seen is copied
    assert core.lm_head.weight is copied  # between calls: who writes into it must reach what is trained


def test_what_is_compiled_reads_what_the_layer_computes_with():
    core = get_peft_model(bf16_llama(tie_word_embeddings=True), LongLoraConfig(r=4)).get_base_model()

    class Multiplies(nn.Module):
        def forward(self, states):
            return states @ core.lm_head.weight.t()

    states, multiplies = torch.randn(2, 5, core.config.hidden_size).bfloat16(), Multiplies()
    multiplies.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(multiplies(states), core.lm_head(states))


def test_a_matrix_without_numbers_is_read_too():
    """On "meta", where accelerate looks for ties, torch refuses to be asked for autocast."""
    model = get_peft_model(bf16_llama(tie_word_embeddings=True), LongLoraConfig(r=4, group_size=16)).train()
    core, ids = model.get_base_model().to("meta"), TOKENS.to("meta")
    assert core.lm_head.weight is core.lm_head.modules_to_save.default.weight
    assert Reads()(core.lm_head).dtype == torch.bfloat16
    logits = core(ids).logits  # sparse
    assert (logits.shape, logits.dtype) == ((*ids.shape, core.vocab_size), torch.bfloat16)


@pytest.mark.parametrize("autocast", [False, True])
def test_small_steps_move_every_norm(tmp_path, autocast):
    """At the paper's learning rate: with bfloat16 copies not one entry of the norms would change."""
    model = get_peft_model(bf16_llama(), LongLoraConfig(r=4))
    before = {n: p.detach().clone() for n, p in trained_copies(model).items()}
    args = TrainingArguments(
        tmp_path, max_steps=4, learning_rate=2e-5, bf16=autocast, use_cpu=True, report_to="none", save_strategy="no"
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    Trainer(model, args, train_dataset=rows).train()
    after = trained_copies(model)
    for name, weight in before.items():
        changed = (after[name] != weight).float().mean()
        assert changed > 0.95 if "norm" in name else changed > 0.5, (name, changed)


@pytest.mark.parametrize("tied", [False, True])
def test_save_load_and_merge(tmp_path, tied):
    base = bf16_llama(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LongLoraConfig(r=4, context_length=128))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model(TOKENS).logits
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(again(TOKENS).logits, expected)
    merged = again.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert type(merged.model.norm).__name__ == "LlamaRMSNorm" and type(merged.model.embed_tokens) is nn.Embedding
    assert merged.model.embed_tokens.weight.data_ptr() == merged.lm_head.weight.data_ptr() or not tied
    difference = (merged(TOKENS).logits - expected).float().norm() / expected.float().norm()
    assert difference < 0.03  # LoRA's product, rounded to bfloat16 once more


def test_opting_out_leaves_the_copies_as_they_are():
    model = get_peft_model(bf16_llama(), LongLoraConfig(r=4), autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for p in trained_copies(model).values())


def test_a_cast_of_the_whole_model_is_what_it_says():
    model = get_peft_model(bf16_llama(), LongLoraConfig(r=4)).eval()
    assert model.float()(TOKENS).logits.dtype == torch.float32
    assert model.to("cpu")(TOKENS).logits.dtype == torch.float32
    assert model.bfloat16()(TOKENS).logits.dtype == torch.bfloat16


def test_threads_may_share_a_trained_copy():
    """Two forwards in one module, the second begun amid the first: neither sees weights of the other."""
    inside, done = threading.Event(), threading.Event()

    class Slow(nn.LayerNorm):
        def forward(self, x):
            if threading.current_thread().name == "first":
                inside.set()
                assert done.wait(60)
            return super().forward(x)

    module, x = Slow(4).to(torch.bfloat16), torch.randn(3, 4, dtype=torch.bfloat16)
    wanted = nn.LayerNorm(4).to(torch.bfloat16)(x)
    keep_in_float32([module])
    found = {}
    first = threading.Thread(target=lambda: found.update(first=module(x)), name="first")
    first.start()
    assert inside.wait(60)
    found["second"] = module(x)
    done.set()
    first.join()
    assert torch.equal(found["first"], wanted) and torch.equal(found["second"], wanted)
    assert module.weight.dtype == torch.float32 and "weight" not in vars(module)


def test_an_embedding_rounds_the_rows_it_looks_up_and_not_the_matrix():
    """A token of an answer costs a row, not the matrix: seen by the sizes of all tensors that are made."""
    module = nn.Embedding(5000, 8, padding_idx=0).to(torch.bfloat16)
    ids = torch.tensor([[3, 0, 4999]])
    wanted = module(ids)
    keep_in_float32([module])
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        out = module(ids)
    assert torch.equal(out, wanted) and out.dtype == torch.bfloat16 and max(sizes) <= 24
    module(ids).float().sum().backward()
    assert module.weight.grad[3].eq(1).all() and module.weight.grad[0].eq(0).all(), "padding learns nothing"

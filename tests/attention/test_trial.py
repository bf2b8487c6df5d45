"""Models that nobody has tried are tried when S2-Attn is put on them: a few tokens, twice, once a kind of model."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from peft_longlora import configure_attention
from peft_longlora.attention.settings import S2_ATTN, settings_on
from tests.helpers.every_config import tiny_config, tiny_model

IDS = torch.arange(3, 43)[None]
NUMBERS = itertools.count(200)


def a_llama():
    """A model of a config that was not tried before in this process."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=next(NUMBERS), max_position_embeddings=64)).train()


def lengths_of(model):
    """The lengths of the rows of every forward from now on."""
    found = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: found.append(args[0].shape[1]))
    return found


def refused(model, message):
    before = model.state_dict()
    with pytest.raises(NotImplementedError, match=message):
        configure_attention(model, group_size=8)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_kind_of_model_is_tried_once_on_few_tokens():
    model = a_llama()
    rows, generator = lengths_of(model), torch.get_rng_state()
    configure_attention(model, group_size=8)
    assert len(rows) == 4 and max(rows) < 32
    assert model.training and torch.equal(torch.get_rng_state(), generator)
    again = LlamaForCausalLM(model.config)
    rows = lengths_of(again)
    configure_attention(again, group_size=16)
    assert not rows


def test_a_trial_that_is_interrupted_leaves_the_model():
    model = a_llama()

    def interrupted(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        configure_attention(model, group_size=8)
    handle.remove()
    assert model.config._attn_implementation == "sdpa" and settings_on(model) is None


def test_weights_that_are_not_here_are_not_run():
    with torch.device("meta"):
        model = a_llama()
    rows = lengths_of(model)
    configure_attention(model, group_size=8)
    assert not rows and model.config._attn_implementation == S2_ATTN


class LigerNorm(torch.nn.Module):
    """As Liger's norms, which Triton computes: it needs a GPU."""

    __module__ = "liger_kernel.transformers.rms_norm"

    def forward(self, states):
        if states.device.type == "cpu":
            raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
        return states

    forward.__module__ = __module__


def test_a_model_with_kernels_that_wait_for_a_gpu_is_not_run_on_the_cpu():
    """A base that AutoLigerKernelForCausalLM loaded, or one made after Liger replaced the classes of this process."""
    model = a_llama()
    model.model.norm = LigerNorm()
    rows = lengths_of(model)
    configure_attention(model, group_size=8)
    assert not rows and model.config._attn_implementation == S2_ATTN


def test_a_norm_whose_forward_was_replaced_waits_too():
    model = a_llama()
    model.model.norm.forward = LigerNorm.forward.__get__(model.model.norm)
    rows = lengths_of(model)
    configure_attention(model, group_size=8)
    assert not rows


def test_a_model_that_computes_something_else_under_another_name_is_refused():
    model = a_llama()

    def change(module, args, out):
        if model.config._attn_implementation == S2_ATTN:
            out.logits = out.logits + 1

    model.register_forward_hook(change)
    refused(model, "computes something else if its attention has another name")


def test_a_model_that_lets_tokens_see_later_ones_is_refused():
    model = a_llama()
    model.model.norm.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    refused(model, "lets tokens see later ones")


def test_a_model_that_needs_more_than_tokens_is_refused_with_its_error():
    model = a_llama()

    def need(module, args, kwargs):
        if "pixel_values" not in kwargs:
            raise ValueError("You have to specify pixel_values.")

    model.register_forward_pre_hook(need, with_kwargs=True)
    refused(model, r"cannot be run on token ids alone.*ValueError: You have to specify pixel_values\.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("doge", r"doge.*does not run with S2-Attn's mask in place of its own: AttributeError.*'dtype'"),
        ("deepseek_v32", r"chooses keys with a mask of its own, which DeepseekV32Attention makes only for"),
    ],
)
def test_a_model_with_a_mask_of_its_own_is_refused(name, message):
    refused(tiny_model(name).train(), message)


def test_a_model_without_attention_layers_on_text_is_refused():
    """Tokens of a model whose layers are skipped reach no attention."""
    model = a_llama()
    model.model.layers = torch.nn.ModuleList(_Skipped(layer) for layer in model.model.layers)
    refused(model, "calls none of its attention layers")


class _Skipped(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.attention_type = layer, getattr(layer, "attention_type", "full_attention")

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def test_a_trial_of_one_config_says_nothing_of_another():
    config = tiny_config("llama")
    configure_attention(AutoModelForCausalLM.from_config(config), group_size=8)
    config.sliding_window, config.num_hidden_layers = None, 1
    other = AutoModelForCausalLM.from_config(config)
    rows = lengths_of(other)
    configure_attention(other, group_size=8)
    assert len(rows) == 4


class _Shift(torch.nn.Module):
    """A feed-forward layer that reads the token before."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.nn.functional.pad(x, (0, 0, 1, -1)))


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_packed_rows_are_refused_where_something_else_than_attention_reads_earlier_tokens(training):
    model = a_llama().train(training)
    model.model.layers[1].mlp = _Shift(model.model.layers[1].mlp)
    settings = configure_attention(model, group_size=8)
    assert (settings.given_size, settings.mode, settings.backend) == (8, "auto", None)
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    model(input_ids=IDS, use_cache=False)
    for _ in range(2):  # and it is remembered for models of the same kind, which are not tried again
        with pytest.raises(NotImplementedError, match=r"in dense mode.*Give each document a row of its own"):
            model(input_ids=IDS, position_ids=positions, use_cache=False)
        configure_attention(model, group_size=16)


class _FirstTokensSeeEachOther(LlamaAttention):
    """The prompt is read in both directions, as PrefixLM models do: the layer makes its mask itself."""

    def forward(self, hidden_states, *, attention_mask, **kwargs):
        length = hidden_states.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask[:8, :8] = True
        return super().forward(hidden_states, attention_mask=mask[None, None], **kwargs)


def test_a_layer_that_makes_its_mask_is_refused_at_once():
    """It is computed rightly while it is dense, and the first training step would fail."""
    model = a_llama()
    layer = model.model.layers[1]
    layer.self_attn = _FirstTokensSeeEachOther(model.config, 1)
    refused(model, r"a mask of its own \(\(1, 1, 24, 24\) in _FirstTokensSeeEachOther\)")


def test_arguments_that_kernels_do_not_know_are_refused(monkeypatch):
    """A name that no attention knows, and one that sdpa knows."""
    for name in ("my_bias", "position_bias"):
        model = a_llama()
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: (args, {**kwargs, name: torch.zeros(1, 4, 24, 24)}),
                with_kwargs=True,
            )
        if name == "position_bias":  # sdpa takes it
            refused(model, f"gives its attention {name}, which the kernels of S2-Attn do not know")
        else:
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", _without(name))
            refused(model, f"gives its attention {name}, which the kernels of S2-Attn do not know")


def _without(name):
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args, **kwargs):
        kwargs.pop(name, None)
        return sdpa(*args, **kwargs)

    return attend

"""Models without positions get a longer window and nothing else; those with positions of another kind are refused."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from peft_longlora import LongLoraConfig, configure_attention, restore_rope, scale_rope
from peft_longlora.rope import absent
from tests.helpers.every_check import Examination
from tests.helpers.every_config import WINDOW, tiny_config, tiny_model

LONGER = 4 * WINDOW
IDS = torch.arange(3, 43)[None]
GRANITE = {"position_embedding_type": "nope"}  # as its hybrids are published


@pytest.fixture(autouse=True)
def _nothing_was_tried(monkeypatch):
    monkeypatch.setattr(absent, "_tried", {})


def test_a_hybrid_without_positions_holds_what_every_supported_model_holds():
    found = Examination("granitemoehybrid", "causal", **GRANITE).run()
    assert (found.result, found.why, found.layers) == ("supported", [], (1, 1))


def test_only_the_window_changes():
    model = tiny_model("jamba")
    before, config = model(IDS).logits, copy.deepcopy(model.config.to_dict())
    assert scale_rope(model, LONGER) is None
    assert model.config.to_dict() == {**config, "max_position_embeddings": LONGER}
    assert torch.equal(model(IDS).logits, before)
    with pytest.raises(ValueError, match="rescaled already"):
        scale_rope(model, 2 * LONGER)
    restore_rope(model)
    assert model.config.to_dict() == config
    assert scale_rope(model, WINDOW) is None and model.config.to_dict() == config


@pytest.mark.parametrize(
    "asked", [dict(rope_type="linear"), dict(rope_parameters={"rope_type": "linear", "factor": 4})]
)
def test_a_scaling_of_nothing_is_refused(asked):
    with pytest.raises(ValueError, match=r"has no effect.*no position embeddings.*Leave it out"):
        scale_rope(tiny_model("jamba"), LONGER, **asked)
    with pytest.raises(ValueError, match=r"has no effect.*no position embeddings.*Leave it out"):
        get_peft_model(tiny_model("jamba"), LongLoraConfig(r=2, context_length=LONGER, **asked))


def test_there_is_nothing_to_learn():
    with pytest.raises(NotImplementedError, match="has 0 rotary modules"):
        get_peft_model(tiny_model("jamba"), LongLoraConfig(r=2, context_length=LONGER, rope_type="learned"))


def test_an_adapter_raises_the_window_and_is_read_again(tmp_path):
    config = LongLoraConfig(r=2, context_length=LONGER, group_size=16)
    model = get_peft_model(tiny_model("jamba"), config)
    assert (config.applied_rope_parameters, config.applied_context_length) == (None, LONGER)
    assert config.base_context_length == WINDOW
    with model.disable_adapter():
        assert model.config.max_position_embeddings == WINDOW
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model("jamba"), tmp_path / "adapter")
    assert loaded.config.max_position_embeddings == LONGER
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.max_position_embeddings == LONGER
    with pytest.raises(ValueError, match=f"window of {WINDOW} tokens"):
        PeftModel.from_pretrained(merged, tmp_path / "adapter")


# Learned and added to the embeddings; a rotation of the model's own; a bias of the scores by distance, in the last
# without transformers' attention.
OTHER = ["gpt2", "opt", "gptj", "codegen", "inkling_text", "bloom"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in OTHER if name in CONFIG_MAPPING])
def test_positions_of_another_kind_are_refused(name, dtype):
    model = tiny_model(name).to(dtype)
    for call in (lambda: scale_rope(model, LONGER), lambda: configure_attention(model, group_size=8)):
        with pytest.raises(NotImplementedError, match=r"no rotary position embeddings|its attention from"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_positions_show_with_weights_as_small_as_a_new_models(dtype):
    """Tokens in another order then change a layer by less than half precision rounds."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gptj", **sizes)).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NotImplementedError, match=r"no rotary position embeddings|its attention from"):
        scale_rope(model, LONGER)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n in ("jamba", "nemotron_h", "kimi_linear") if n in CONFIG_MAPPING])
def test_no_positions_are_found_in_half_precision_too(name, dtype):
    absent.check_positions(tiny_model(name).to(dtype))


def test_layers_with_a_window_may_have_rope_where_full_attention_has_none():
    if "beam" not in CONFIG_MAPPING:
        pytest.skip("transformers has no Beam")
    model = tiny_model("beam")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert scale_rope(model, LONGER) is None and model.config.max_position_embeddings == LONGER
    assert before.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("name", ["cohere2", "llama4_text"])
def test_where_only_layers_with_a_window_rotate_rope_can_be_left(name, tmp_path):
    """As README says: the window is raised, and nothing else."""
    base = tiny_model(name)
    wanted, rope = base(IDS).logits, copy.deepcopy(base.config.rope_parameters)
    config = LongLoraConfig(r=2, context_length=LONGER, rope_parameters={"rope_type": "default"})
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path)
    for one in (model, PeftModel.from_pretrained(tiny_model(name), tmp_path).eval()):
        assert torch.equal(one(IDS).logits, wanted)
        assert (one.config.rope_parameters, one.config.max_position_embeddings) == (rope, LONGER)
    yarn = get_peft_model(tiny_model(name), LongLoraConfig(r=2, context_length=LONGER)).eval()
    assert not torch.allclose(yarn(IDS).logits, wanted, atol=1e-3)


def test_a_model_that_cannot_run_is_not_believed():
    config = tiny_config("jamba")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(NotImplementedError, match=r"shows only when it runs.*before the model is sharded"):
        scale_rope(model, LONGER)


def test_processes_without_weights_leave_it_to_the_first(monkeypatch):
    """FSDP may load weights in the first process alone; the others hold empty ones."""
    model, other = tiny_model("jamba"), tiny_model("gpt2")
    with torch.no_grad():
        for parameter in [*model.parameters(), *other.parameters()]:
            parameter.zero_()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    absent.check_positions(model)
    absent.check_positions(other)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    for one in (model, other):
        with pytest.raises(NotImplementedError, match="shows only when it runs"):
            absent.check_positions(one)
    assert not absent._tried


class Own(nn.Module):
    """A layer in which a token sees itself alone."""

    def forward(self, hidden_states):
        return hidden_states * 2, None


def test_a_layer_that_does_not_look_at_others_says_nothing():
    move, hidden = absent._Move(), torch.randn(1, 24, 8)
    move(Own(), (hidden,), {}, Own()(hidden))
    assert move.errors == [(float("inf"), absent.MOST)]

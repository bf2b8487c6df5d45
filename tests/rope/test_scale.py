"""RoPE rescaled in place, against saving and loading, and against formulas written here."""

import copy
import math

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from peft_longlora import LongLoraConfig, restore_rope, scale_rope
from peft_longlora.rope.parameters import window_of
from tests.helpers.configs import tiny_llama_config
from tests.helpers.tiny import assert_same, make, snapshot

WINDOW, LONGER, D = 64, 256, 8
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=WINDOW, bos_token_id=1, eos_token_id=2, pad_token_id=0)
CONFIGS = {
    "llama": tiny_llama_config(),
    "gpt_neox": GPTNeoXConfig(**SIZES, rotary_pct=0.5),  # half of the head is rotated
    "gemma3_text": Gemma3TextConfig(  # one dict a layer type
        **SIZES,
        num_key_value_heads=2,
        head_dim=D,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
ROTATED = {"llama": D, "gpt_neox": D // 2, "gemma3_text": D}
TYPES = ["linear", "ntk", "dynamic", "yarn", "llama3", "longrope"]


def build(name="llama", **kwargs):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), **kwargs).eval()


def arguments(rope_type, name="llama"):
    """What a user passes for a type; only longrope has factors of its own."""
    if rope_type != "longrope":
        return dict(rope_type=rope_type)
    half = ROTATED[name] // 2
    return dict(
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(half)],
            "long_factor": [2.0 + 0.5 * i for i in range(half)],
            "original_max_position_embeddings": WINDOW,
        }
    )


def rotary(model):
    return next(m for m in model.modules() if "RotaryEmbedding" in type(m).__name__)


def buffers(model):
    return {k: v.clone() for k, v in rotary(model).named_buffers()}


def frequencies(model, which="inv_freq"):
    found = dict(rotary(model).named_buffers())
    return found.get(f"full_attention_{which}", found.get(which))


def full_rope(config):
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def tokens(length):
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, length=100):
    return model(tokens(length), use_cache=False).logits


def assert_equal_buffers(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name


def test_a_dict_for_each_layer_type_is_used_as_it_is(tmp_path):
    """Both kinds of gemma3's layers rescaled by one nested dict, and put back."""
    model = build("gemma3_text")
    before = logits(model)
    model.save_pretrained(tmp_path)
    given = {
        "full_attention": {"rope_type": "linear", "factor": 4.0},
        "sliding_attention": {"rope_type": "linear", "factor": 2.0},
    }
    applied = scale_rope(model, rope_parameters=given)
    thetas = {key: value["rope_theta"] for key, value in build("gemma3_text").config.rope_parameters.items()}
    assert applied == {key: {**value, "rope_theta": thetas[key]} for key, value in given.items()}
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=applied).eval()
    assert torch.equal(logits(model), logits(fresh)) and not torch.equal(logits(model), before)
    restore_rope(model)
    assert torch.equal(logits(model), before)


# -- in place equals a fresh load --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rope_type", TYPES)
def test_in_place_equals_saving_and_loading(rope_type, name, tmp_path):
    if (rope_type, name) == ("longrope", "gemma3_text") and Version(transformers.__version__) < Version("5.21"):
        pytest.skip("transformers before 5.21 fails with longrope where rope_parameters hold one dict a layer type")
    model = build(name)
    before = logits(model)
    applied = scale_rope(model, LONGER, **arguments(rope_type, name))
    assert applied == full_rope(model.config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert loaded.config.max_position_embeddings == model.config.max_position_embeddings
    assert_equal_buffers(buffers(model), buffers(loaded))
    # Twice: a long row makes "dynamic" and "longrope" recompute, a short row puts them back.
    for length in (100, 300, 20):
        assert torch.equal(logits(model, length), logits(loaded, length))
        assert_equal_buffers(buffers(model), buffers(loaded))
    assert not torch.equal(logits(model, 300)[:, :100], before)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rope_type", TYPES)
def test_restore_is_bit_equal(rope_type, name):
    """Also after rows that made the scaled frequencies change; the module stays the same object."""
    model, module = build(name), rotary(build(name))
    module = rotary(model)
    before, old, config = logits(model), buffers(model), model.config.to_dict()
    attributes = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    scale_rope(model, LONGER, **arguments(rope_type, name))
    logits(model, 300)
    restore_rope(model)
    assert rotary(model) is module
    assert torch.equal(logits(model), before)
    assert_equal_buffers(buffers(model), old)
    assert model.config.to_dict() == config
    assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == attributes
    restore_rope(model)  # a second time: nothing to do
    assert model.config.to_dict() == config


def test_restored_models_can_be_scaled_anew():
    model, other = build(), build()
    scale_rope(model, LONGER, rope_type="linear")
    restore_rope(model)
    scale_rope(model, LONGER, rope_type="yarn")
    scale_rope(other, LONGER, rope_type="yarn")
    assert_equal_buffers(buffers(model), buffers(other))


def test_sliding_layers_keep_their_frequencies():
    model = build("gemma3_text")
    before, sliding = buffers(model), copy.deepcopy(model.config.rope_parameters["sliding_attention"])
    scale_rope(model, LONGER, rope_type="linear")
    after = buffers(model)
    assert model.config.rope_parameters["sliding_attention"] == sliding
    assert torch.equal(after["sliding_attention_inv_freq"], before["sliding_attention_inv_freq"])
    torch.testing.assert_close(after["full_attention_inv_freq"], before["full_attention_inv_freq"] / 4)


@pytest.mark.parametrize("how", ["from_pretrained", "to"])
def test_frequencies_stay_float32_in_a_bf16_model(how, tmp_path):
    if how == "to":  # this rounds the buffers too
        model = build().to(torch.bfloat16)
    else:
        build().save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before, old = logits(model), buffers(model)
    scale_rope(model, LONGER)
    expected = build()
    scale_rope(expected, LONGER)
    assert all(b.dtype == torch.float32 for b in buffers(model).values())
    assert_equal_buffers(buffers(model), buffers(expected))
    assert logits(model).dtype == torch.bfloat16
    restore_rope(model)
    assert_equal_buffers(buffers(model), old)
    assert torch.equal(logits(model), before)


# -- formulas -----------------------------------------------------------------------------------------------------


def plain_frequencies(name="llama", theta=None):
    theta = theta or full_rope(build(name).config)["rope_theta"]
    dim = ROTATED[name]
    return torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_base_is_what_these_formulas_start_from(name):
    torch.testing.assert_close(frequencies(build(name)), plain_frequencies(name))


def test_a_base_like_the_published_gemma_3_is_extended_further():
    """Full attention is scaled by 8 already, and the config stores the whole window."""
    scaled, local = (
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": 1e4},
    )
    config = copy.deepcopy(CONFIGS["gemma3_text"])
    config.rope_parameters = {"full_attention": scaled, "sliding_attention": local}
    assert window_of(config) == WINDOW
    twice = {"full_attention": {**scaled, "factor": 16.0}, "sliding_attention": local}
    for length in (2 * WINDOW, None):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="s2_attn")
        model = get_peft_model(base, LongLoraConfig(context_length=length, rope_parameters=twice))
        assert window_of(model.config) == model.config.max_position_embeddings == 2 * WINDOW
        settings = model.peft_config["default"]
        assert (settings.base_context_length, settings.applied_context_length) == (WINDOW, 2 * WINDOW)
        assert settings.applied_group_size == (length or WINDOW) // 4
    base = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="s2_attn")
    with pytest.raises(ValueError, match=f"context_length={3 * WINDOW}, .*Set factor to 24.0"):
        scale_rope(base, 3 * WINDOW, rope_parameters=twice)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [256, 100])
def test_linear_divides_the_frequencies_by_the_factor(name, length):
    """Position Interpolation, arXiv:2306.15595; the stored length stays, as readers multiply it by the factor.

    Not where layer types have a scaling each: the published Gemma 3 stores its whole window, 8 times the first one.
    """
    model = build(name)
    applied = scale_rope(model, length, rope_type="linear")
    torch.testing.assert_close(frequencies(model), plain_frequencies(name) * WINDOW / length)
    assert applied["factor"] == length / WINDOW
    assert model.config.max_position_embeddings == (length if name == "gemma3_text" else WINDOW)
    assert window_of(model.config) == length


@pytest.mark.parametrize("name", CONFIGS)
def test_ntk_raises_theta_once(name):
    model, dim = build(name), ROTATED[name]
    theta = full_rope(model.config)["rope_theta"] * 4 ** (dim / (dim - 2))
    applied = scale_rope(model, LONGER, rope_type="ntk")
    assert applied["rope_type"] == "default" and applied["rope_theta"] == pytest.approx(theta)
    torch.testing.assert_close(frequencies(model), plain_frequencies(name, theta))
    # Its point: the lowest frequency is interpolated by the factor, the highest is left alone.
    torch.testing.assert_close(frequencies(model)[[0, -1]], plain_frequencies(name)[[0, -1]] / torch.tensor([1, 4.0]))
    assert model.config.max_position_embeddings == LONGER


def test_dynamic_leaves_rows_inside_the_window_alone_and_raises_theta_beyond():
    model = build()
    before = logits(model, WINDOW)
    scale_rope(model, LONGER, rope_type="dynamic")
    assert torch.equal(logits(model, WINDOW), before)
    assert model.config.max_position_embeddings == WINDOW
    logits(model, 200)
    theta = full_rope(model.config)["rope_theta"]
    raised = theta * (4 * 200 / WINDOW - 3) ** (D / (D - 2))
    torch.testing.assert_close(frequencies(model), plain_frequencies(theta=raised))


@pytest.mark.parametrize("name", CONFIGS)
def test_yarn_is_transformers_own_with_the_papers_temperature(name):
    model = build(name)
    scale_rope(model, LONGER, rope_type="yarn")
    config = copy.deepcopy(CONFIGS[name])
    full_rope(config).update(rope_type="yarn", factor=4.0, original_max_position_embeddings=WINDOW)
    config.max_position_embeddings = LONGER
    layer_type = "full_attention" if name == "gemma3_text" else None
    expected, temperature = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu", layer_type=layer_type)
    assert torch.equal(frequencies(model), expected)
    prefix = "full_attention_" if layer_type else ""
    assert getattr(rotary(model), f"{prefix}attention_scaling") == temperature == pytest.approx(0.1 * math.log(4) + 1)
    assert model.config.max_position_embeddings == LONGER


def test_llama3_by_its_published_rule():
    """Wavelengths below L / 4 stay, above L / 1 are divided, between is a straight line (Llama 3.1 release)."""
    model = build()
    scale_rope(model, LONGER, rope_type="llama3")
    expected = []
    for f in plain_frequencies().tolist():
        wavelength = 2 * math.pi / f
        smooth = min(1, max(0, (WINDOW / wavelength - 1) / (4 - 1)))
        expected.append((1 - smooth) * f / 4 + smooth * f)
    torch.testing.assert_close(frequencies(model), torch.tensor(expected))
    assert model.config.max_position_embeddings == LONGER


def test_rope_parameters_are_used_as_they_are():
    """Nothing is filled in but what the base states of itself: theta and the rotated part."""
    model = build("gpt_neox")
    given = {"rope_type": "linear", "factor": 3.0}
    applied = scale_rope(model, rope_parameters=given)
    assert given == {"rope_type": "linear", "factor": 3.0}
    base = CONFIGS["gpt_neox"].rope_parameters
    kept = {key: base[key] for key in ("rope_theta", "partial_rotary_factor")}
    assert applied == {**given, **kept}
    torch.testing.assert_close(frequencies(model), plain_frequencies("gpt_neox") / 3)
    own_theta = build()
    scale_rope(own_theta, LONGER, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    torch.testing.assert_close(frequencies(own_theta), plain_frequencies(theta=5e5))


def test_longrope_takes_the_long_factors_beyond_the_window_and_states_the_length():
    model = build()
    scale_rope(model, LONGER, **arguments("longrope"))
    assert model.config.max_position_embeddings == LONGER
    given = arguments("longrope")["rope_parameters"]
    for length, which in ((20, "short_factor"), (100, "long_factor")):
        logits(model, length)
        torch.testing.assert_close(frequencies(model), plain_frequencies() / torch.tensor(given[which]))


@pytest.mark.parametrize("which", ["short_factor", "long_factor"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("more", [-1, 1, "one for all"])
def test_longrope_of_another_number_of_factors_is_refused(which, name, more):
    """Also in the list that a short row does not use: a long row would end the training."""
    model, given = build(name), arguments("longrope", name)
    factors = given["rope_parameters"][which]
    given["rope_parameters"][which] = [2.0] if more == "one for all" else [2.0] * (len(factors) + more)
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(ValueError, match=rf"{which} has \d+ factors, and {name} has {len(factors)} frequencies"):
        scale_rope(model, LONGER, **given)
    assert torch.equal(logits(model), before) and model.config.to_dict() == config


@pytest.mark.parametrize("context_length", [None, 10, WINDOW])
def test_a_window_that_is_not_longer_changes_nothing(context_length):
    model = build()
    before, config = logits(model), model.config.to_dict()
    assert scale_rope(model, context_length) is None
    assert torch.equal(logits(model), before) and model.config.to_dict() == config
    scale_rope(model, LONGER)  # and is no first scaling
    restore_rope(model)
    assert torch.equal(logits(model), before)


# -- refusals -----------------------------------------------------------------------------------------------------

SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": arguments("longrope")["rope_parameters"] | {"original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("rope_type", SCALED)
def test_a_scaled_base_is_refused_unless_rope_parameters_are_given(rope_type):
    config = tiny_llama_config(rope_parameters={**SCALED[rope_type], "rope_theta": 1e4})
    model = AutoModelForCausalLM.from_config(config)
    before, stated = buffers(model), model.config.to_dict()
    with pytest.raises(ValueError, match=rf"scaled already .*{rope_type}.*rope_parameters"):
        scale_rope(model, 1024)
    assert_equal_buffers(buffers(model), before)
    assert model.config.to_dict() == stated
    new = {"rope_type": "linear", "factor": 16.0}
    scale_rope(model, rope_parameters=new)
    torch.testing.assert_close(frequencies(model), plain_frequencies(theta=1e4) / 16)
    restore_rope(model)
    assert_equal_buffers(buffers(model), before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(rope_type="pi"), r"rope_type='pi' is unknown.*'linear', 'ntk', 'dynamic', 'yarn', 'llama3', 'longrope'"),
        (dict(rope_type=None), r"rope_type=None is unknown"),
        (
            dict(rope_type="linear", rope_parameters={"rope_type": "yarn", "factor": 2.0}),
            r"rope_type='linear' and rope_parameters=.*exclude each other.*one of them",
        ),
        (dict(rope_parameters={"factor": 2.0}), r"rope_parameters=\{'factor': 2.0\} lacks 'rope_type'.*Add it"),
        (dict(rope_parameters={"rope_type": "linear", "factor": "4"}), r"factor='4' must be a number, 1 or more"),
        (dict(rope_parameters={"rope_type": "linear", "factor": -2.0}), r"factor=-2\.0 must be a number, 1 or more"),
        (
            dict(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 4.0}}),
            r"one dict for each layer type, but llama has one dict for all",
        ),
        (dict(rope_parameters="linear"), r"rope_parameters='linear'.*dict"),
        (dict(rope_type="longrope"), r"rope_type='longrope' needs.*rope_parameters.*short_factor, long_factor"),
        (dict(rope_parameters={"rope_type": "linear"}), r"rope_parameters=.*linear.*factor"),
        (dict(rope_parameters={"rope_type": "spiral", "factor": 2.0}), r"rope_parameters=.*spiral"),
        (
            dict(rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 64}),
            r"rope_parameters=.*longrope.*(short|long)_factor",
        ),
        (
            dict(
                rope_parameters=arguments("longrope")["rope_parameters"]
                | {"short_factor": [1.0] * 7, "long_factor": [2.0] * 7}
            ),
            r"rope_parameters=.*longrope.*llama",
        ),
    ],
)
def test_bad_values_are_refused_and_leave_the_model_as_it_was(kwargs, message):
    model = build()
    before, config = logits(model), model.config.to_dict()
    with pytest.raises((ValueError, NotImplementedError), match=message):
        scale_rope(model, LONGER, **kwargs)
    assert torch.equal(logits(model), before) and model.config.to_dict() == config
    scale_rope(model, LONGER)
    restore_rope(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("rope_type", ["linear", "ntk", "dynamic", "yarn", "llama3"])
def test_an_absurd_window_is_refused(rope_type):
    model = make()
    before = snapshot(model)
    for length, said in ((10**11, "rope_parameters=.* must be a number"), (10**400, "at most 2\\*\\*40")):
        with pytest.raises(ValueError, match=said):
            scale_rope(model, length, rope_type=rope_type)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("call", [lambda model: scale_rope(model, 128), restore_rope], ids=["scale", "restore"])
def test_what_is_no_transformers_model_is_refused(call):
    with pytest.raises(NotImplementedError, match="Linear is not a transformers model, so there is no RoPE"):
        call(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("context_length", ["32k", 0, -1, 1.5, True])
def test_a_length_that_is_no_number_of_tokens_is_refused(context_length):
    with pytest.raises(ValueError, match=rf"context_length={context_length!r}.*tokens"):
        scale_rope(build(), context_length)


def test_scaling_twice_is_refused():
    model = build()
    scale_rope(model, LONGER)
    with pytest.raises(ValueError, match=r"rescaled already.*restore_rope"):
        scale_rope(model, 2 * LONGER)


def test_a_model_without_rotary_embeddings_is_refused():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(NotImplementedError, match=r"gpt2 .GPT2LMHeadModel. has no rotary"):
        scale_rope(model, 4096)


def test_an_adapter_keeps_its_frequencies_in_float32_when_the_model_is_cast():
    model = get_peft_model(build(dtype=torch.bfloat16), LongLoraConfig(r=2, context_length=LONGER)).eval()
    rotary = model.get_base_model().model.rotary_emb
    expected, wanted = model(tokens(100)).logits, rotary.inv_freq.clone()
    model.to(torch.bfloat16)
    assert rotary.inv_freq.dtype == torch.bfloat16  # what torch does
    assert torch.equal(model(tokens(100)).logits, expected)
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, wanted)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
LONGROPE["original_max_position_embeddings"] = 64


@pytest.mark.parametrize("how", ["to", "deepcopy", "half"])
@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_frequencies_stay_float32_without_an_adapter_also_after_a_long_row(kind, how):
    """`dynamic` and `longrope` note after a long row which frequencies are in force; rounding must not outlive that."""
    model, rows = make(), [torch.arange(3, 3 + n)[None] % 97 for n in (200, 40, 220)]
    parameters = {**LONGROPE, "factor": 4.0} if kind == "longrope" else None
    scale_rope(model, 256, rope_type="yarn" if parameters else kind, rope_parameters=parameters)
    rotary = model.model.rotary_emb
    with torch.no_grad():
        wanted = [rotary(torch.zeros(1), torch.arange(row.shape[1])[None]) for row in rows]
        if how == "deepcopy":
            model = copy.deepcopy(model)
        model = model.half() if how == "half" else model.to(torch.bfloat16)
        rotary = model.model.rotary_emb
        for row, (cos, sin) in zip(rows, wanted, strict=True):
            again = rotary(torch.zeros(1), torch.arange(row.shape[1])[None])
            assert torch.equal(again[0], cos) and torch.equal(again[1], sin)
            model(row)
    restore_rope(model)
    assert not rotary._forward_pre_hooks

"""`far_layers` against attention matrices in full, which eager attention returns."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from peft_longlora import configure_attention, far_layers
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention import reach
from tests.helpers.largest import Largest
from tests.helpers.tiny import assert_same as assert_unchanged
from tests.helpers.tiny import extend, make, snapshot

BEYOND, QUERIES = 40, 17
ROWS = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (96, 81)]


@pytest.fixture(autouse=True)
def few_sinks(monkeypatch):
    monkeypatch.setattr(reach, "SINKS", 5)


def of(kind: str):
    common = dict(num_hidden_layers=4)
    if kind == "gemma2":  # scores have a softcap, every second layer a window
        torch.manual_seed(0)
        config = Gemma2Config(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, query_pre_attn_scalar=2, attn_logit_softcapping=1.5, sliding_window=16, **common,
        )  # fmt: skip
        # transformers before 5.2x let sdpa compute it, which leaves the softcap out
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.2
        return model
    return make(kind, **common)


def by_matrices(model, rows) -> dict[int, float]:
    model.set_attn_implementation("eager")
    layers: dict[int, list[float]] = {}
    for row in rows:
        with torch.no_grad():
            found = model(input_ids=row[None], use_cache=False, output_attentions=True).attentions
        for layer, weights in enumerate(found):
            length = weights.shape[-1]
            shares = []
            for query in torch.linspace(BEYOND + 5, length - 1, QUERIES).round().long().tolist():
                far = [key for key in range(5, length) if query - key >= BEYOND]
                shares.append(weights[0, :, query, far].sum(-1).mean().item())
            layers.setdefault(layer, []).append(sum(shares) / len(shares))
    return {layer: sum(shares) / len(shares) for layer, shares in layers.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen3", "gemma2"])
def test_figures_are_those_of_whole_matrices(kind):
    model = of(kind).eval()
    found = far_layers(model, ROWS, BEYOND, queries=QUERIES)
    expected = by_matrices(model, ROWS)
    assert found == pytest.approx(expected, abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True) and max(found.values()) > 0.01
    if kind == "gemma2":
        assert found[0] == found[2] == 0


def test_an_adapter_is_measured_with_its_rope():
    model = extend(of("llama"), init_lora_weights=False, group_size=16).train()
    found = far_layers(model, [row[None] for row in ROWS], BEYOND, queries=QUERIES)
    assert model.training
    merged = model.eval().merge_and_unload()
    assert found == pytest.approx(by_matrices(merged, ROWS), abs=1e-5)


@pytest.mark.parametrize("is_configured", [False, True])
def test_the_model_is_left_as_it_was(is_configured):
    model = of("llama")
    if is_configured:
        configure_attention(model, group_size=16)
    model.train().model.layers[1].eval()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    far_layers(model, ROWS, BEYOND)
    assert_unchanged(snapshot(model), before)
    assert [module.training for module in model.modules()] == modes
    for module in find_attention_modules(model).values():
        assert getattr(getattr(module, "s2_settings", None), "probe", None) is None


def test_no_attention_matrix_of_a_row_is_held():
    model = make("llama", max_position_embeddings=4096)
    row = torch.randint(3, 97, (2000,))
    with Largest() as largest:
        far_layers(model, [row], 900, queries=8)
    assert largest.numel < 2000 * 2000 / 10


@pytest.mark.parametrize(
    ("rows", "beyond", "queries", "message"),
    [
        ([], 40, 8, "rows is empty"),
        (ROWS, 92, 8, r"rows\[0\] has 96 tokens, .* more than 97 tokens"),
        ([ROWS[0], torch.stack([ROWS[0], ROWS[0]])], 40, 8, r"rows\[1\] has shape \(2, 96\)"),
        (ROWS, 0, 8, "beyond=0 must be a whole number"),
        (ROWS, 40, 1.5, "queries=1.5 must be a whole number"),
        ([ROWS[0], ROWS[0].float()], 40, 8, r"rows\[1\] is a Tensor that holds no whole numbers.*input_ids"),
        ([ROWS[0] > 50], 40, 8, r"rows\[0\] is a Tensor that holds no whole numbers"),
        ([dict(input_ids=ROWS[0])], 40, 8, r"rows\[0\] is a dict that holds no whole numbers"),
        ("a text that is no list of rows", 40, 8, r"rows\[0\] is a str that holds no whole numbers"),
        ([ROWS[0] + 90], 40, 8, r"rows\[0\] has token ids from \d+ to 1\d\d, and the model has 97, from 0 on"),
        ([ROWS[0].where(ROWS[0] > 9, -100)], 40, 8, r"rows\[0\] has token ids from -100 to .* without -100"),
    ],
)
def test_what_cannot_be_measured_is_refused(rows, beyond, queries, message):
    with pytest.raises(ValueError, match=message):
        far_layers(of("llama"), rows, beyond, queries=queries)

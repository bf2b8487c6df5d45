"""Whole models on a GPU: compiled, evaluated through the fastest kernel, and with a softcap.

Run with `pytest -m gpu tests/whole/test_gpu_models.py`.
"""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from peft_longlora import configure_attention, s2_attention, use_attention
from peft_longlora.kernels import backends
from tests.helpers.configs import tiny_llama_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]
SIZES = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
MODEL = Path(__file__).parents[2] / "examples" / "assets" / "stdlib-llama-512"


def differs(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None].cuda()


def test_a_model_compiles_whole_and_once_for_all_lengths():
    """One graph, also for packed rows; compiled once for the first length and once for any other."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(**SIZES)).to("cuda", torch.bfloat16).train()
    compiled = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for one in (model, compiled):
        configure_attention(one, group_size=64)
    compiled.compile(backend=counter, fullgraph=True)
    for packed in (False, True):
        frames = counter.frame_count
        for length in (200, 264, 320, 520):
            tokens = torch.randint(3, 97, (1, length), device="cuda")
            inputs = dict(input_ids=tokens, labels=tokens, use_cache=False)
            if packed:
                inputs["position_ids"] = positions(30, 100, length - 130)
            found = []
            for one in (model, compiled):
                one.zero_grad()
                out = one(**inputs)
                out.loss.backward()
                found.append([out.logits.detach(), *(p.grad for p in one.parameters())])
            assert all(differs(b, a) < 0.02 for a, b in zip(*found, strict=True))
        assert counter.frame_count - frames <= 2


@pytest.fixture(scope="module")
def prompts() -> dict[str, torch.Tensor]:
    """Source text of two lengths, the shorter one padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    text = Path(torch.nn.functional.__file__).read_text()
    return tokenizer([text[:900], text[2000:2500]], return_tensors="pt", padding=True).to("cuda")


@pytest.mark.parametrize("cache", [None, "static", "none"])
def test_the_fastest_kernel_generates_the_tokens_of_stock_sdpa(prompts, cache, monkeypatch):
    """bf16: the same token wherever stock's two best are further apart than rounding reaches."""
    names, pick = set(), backends.choose_backend
    how = dict(use_cache=False) if cache == "none" else dict(cache_implementation=cache)
    how |= dict(max_new_tokens=24, min_new_tokens=24, do_sample=False, output_logits=True)
    found = []
    for is_fastest in (False, True):
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).cuda().eval()
        if is_fastest:
            configure_attention(model, group_size=64, dense_attention="fastest")  # tries a small model on the CPU
            monkeypatch.setattr(backends, "choose_backend", lambda *call: names.add(pick(*call)) or pick(*call))
        found.append(model.generate(**prompts, **how, return_dict_in_generate=True))
    stock, fast = found
    start = prompts["input_ids"].shape[1]
    for row in range(2):
        for step in range(24):
            scores = stock.logits[step][row].float()
            margin = scores.topk(2).values.diff().abs().item()
            assert (fast.logits[step][row].float() - scores).abs().max() < 0.25
            if stock.sequences[row, start + step] != fast.sequences[row, start + step]:
                assert margin < 0.25, (row, step, margin)
                break  # behind a near tie, two texts
    # A static cache stands in front of its own prompt, so nothing there is a whole row.
    assert bool(names) == (cache != "static")
    assert names <= set(backends._order(torch.device("cuda"), True, has_blocks=False)[:5])


def test_evaluation_as_it_comes_is_stock_sdpa_bit_for_bit(prompts):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).cuda().eval()
    with torch.no_grad():
        want = model(**prompts).logits
        configure_attention(model, group_size=64)
        assert torch.equal(model(**prompts).logits, want)
        with use_attention(model, "auto", dense_attention="fastest"):
            real = prompts["attention_mask"].bool()
            assert differs(model(**prompts).logits[real], want[real]) < 0.02


def gemma2(attention: str) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        **{**SIZES, "head_dim": 64, "vocab_size": 97, "num_hidden_layers": 2, "attn_logit_softcapping": 5.0},
        query_pre_attn_scalar=4,  # large scores, so that the cap acts
        initializer_range=0.05,
        sliding_window=64,
        attn_implementation=attention,
    )
    return Gemma2ForCausalLM(config).to("cuda", torch.bfloat16).train()


@pytest.mark.parametrize("backend", [None, "flex"])
def test_softcap_in_a_model(backend):
    """gemma2: dense inside one group equals its own eager attention; in groups, documents of one group each do."""
    tokens = torch.randint(3, 97, (1, 256), device="cuda")
    stock, model = gemma2("eager"), gemma2("eager")
    configure_attention(model, group_size=128, backend=backend)
    for kept in (positions(128, 128), positions(100, 28, 128)):
        found = []
        for one in (stock, model):
            one.zero_grad()
            out = one(input_ids=tokens, position_ids=kept, use_cache=False).logits
            out.float().square().mean().backward()
            found.append([out.detach(), *(p.grad for p in one.parameters())])
        assert all(differs(b, a) < 0.05 for a, b in zip(*found, strict=True))
    with torch.no_grad():
        capped = model(input_ids=tokens, use_cache=False).logits
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert differs(model(input_ids=tokens, use_cache=False).logits, capped) > 0.2


def test_a_kernel_is_chosen_for_every_head_of_the_table():
    """What the table in docs/attention.md says of the fastest kernels, asked of this GPU."""
    device = torch.device("cuda", 0)
    for dim in (64, 128):
        for is_deterministic in (False, True):
            torch.use_deterministic_algorithms(is_deterministic)
            try:
                name = backends.choose_backend(None, True, device, torch.bfloat16, dim, dim, True)
            finally:
                torch.use_deterministic_algorithms(False)
            assert name not in ("sdpa", "flex") and not (is_deterministic and name == "cudnn")
    q = torch.randn(1, 4, 64, 64, device="cuda")  # float32
    assert s2_attention(q, q, q, 2, pattern="full").dtype == torch.float32

"""The life of an adapter on a GPU: bf16 steps against the definition, and bases quantised to 8 and 4 bits.

Run with `pytest -m gpu tests/whole/test_gpu_lifecycle.py`.
"""

import importlib.util

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.helpers.architectures import GROUP, Truth
from tests.helpers.tiny import IDS, extend, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'peft-longlora[quant]'"
)
# Heads of 64 and groups of 16 tokens: sizes that every kernel takes.
SIZES = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
SETTINGS = dict(r=4, context_length=128, group_size=GROUP)
QUANTISED = {
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
    "4 bit": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    ),
}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS.cuda(), use_cache=False).logits.float()


def step(model, count: int = 1):
    """Training steps; returns the first loss and its gradients."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    model.train()
    for i in range(count):
        loss = model(input_ids=IDS.cuda(), labels=IDS.cuda(), use_cache=False).loss
        loss.backward()
        if i == 0:
            first, gradients = loss.item(), {name: p.grad.float().clone() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return first, gradients


def differs(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_a_bf16_step_equals_the_definition(tmp_path):
    """Loss, gradients and logits after the step: no farther from the definition in float32 than twice the definition
    in bf16 is, which is what rounding alone does to this model."""
    model, rounded = (extend(make(dtype=torch.bfloat16, **SIZES).cuda(), **SETTINGS) for _ in range(2))
    exact = extend(make(dtype=torch.bfloat16, **SIZES).float().cuda(), **SETTINGS)
    for other in (rounded, exact):
        other.load_state_dict(model.state_dict())
        other.get_base_model().set_attn_implementation("truth")
    Truth.local, Truth.segment_ids = (), torch.ones_like(IDS).cuda()
    (loss, gradients), (rounded_loss, rounded_gradients), (exact_loss, exact_gradients) = map(
        step, (model, rounded, exact)
    )
    assert abs(loss - exact_loss) < 2 * abs(rounded_loss - exact_loss) + 0.01 * exact_loss
    for name, truth in exact_gradients.items():
        if truth.any():  # LoRA's first factor has none in the first step
            allowed = 2 * differs(rounded_gradients[name], truth) + 0.01
            assert differs(gradients[name], truth) < allowed < 1, name
    truth = logits(exact)
    allowed = 2 * differs(logits(rounded), truth) + 0.01
    assert differs(logits(model.train()), truth) < allowed
    assert differs(logits(model.eval()), truth) > 2 * allowed  # dense: what a wrong mask would give
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(dtype=torch.bfloat16, **SIZES).cuda(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@needs_bitsandbytes
@pytest.mark.parametrize("bits", QUANTISED)
def test_a_quantised_base_is_trained_saved_loaded_and_merged(bits, tmp_path):
    """QLoRA: the adapter trains on the quantised base, and serves on the bf16 one."""
    make(dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path / "base")

    def base(**kwargs):
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.bfloat16, device_map={"": 0}, **kwargs
        )

    def quantised_base():
        model = base(quantization_config=QUANTISED[bits])
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    quantised = quantised_base()
    of_base = logits(quantised)
    model = extend(quantised, **SETTINGS)
    first, gradients = step(model, count=5)
    assert torch.tensor(first).isfinite()
    kinds = ("lora_B", "embed_tokens", "norm")
    assert all(any(kind in name and gradients[name].any() for name in gradients) for kind in kinds)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert step(model)[0] < first
    adapted = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), of_base)
    model.save_pretrained(tmp_path / "adapter")

    again = PeftModel.from_pretrained(quantised_base(), tmp_path / "adapter")
    assert torch.equal(logits(again), adapted)
    served = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    unmerged = logits(served)
    quantisation = differs(logits(base()), of_base)  # what it costs without any adapter
    assert differs(unmerged, adapted) < 2 * quantisation + 0.01
    served.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16, device_map={"": 0})
    assert differs(logits(merged), unmerged) < 0.1  # bf16 rounding of the merged weights
    assert merged.config.rope_parameters["rope_type"] == "yarn"

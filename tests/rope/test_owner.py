"""`scale_rope` and `restore_rope` on models with adapters: whose the RoPE is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_longlora import restore_rope, scale_rope
from tests.helpers.tiny import assert_same, extend, logits, make, snapshot


@pytest.mark.parametrize("call", [restore_rope, lambda model: scale_rope(model, 512)], ids=["restore", "scale"])
@pytest.mark.parametrize("inside", [False, True], ids=["PeftModel", "base"])
@pytest.mark.parametrize("length", [128, None])
def test_the_rope_of_an_adapter_is_left_to_it(call, inside, length):
    base = make()
    of_base = snapshot(base)
    model = extend(base, context_length=length)
    before, wanted = snapshot(model), logits(model)
    with pytest.raises(ValueError, match=r"RoPE of this LlamaForCausalLM is its LongLoRA adapter's.*model.unload\(\)"):
        call(base if inside else model)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), wanted)
    model.unload()
    assert_same(snapshot(base), of_base, but=("requires_grad",))
    scale_rope(base, 512)
    restore_rope(base)
    assert_same(snapshot(base), of_base, but=("requires_grad",))


def test_another_methods_model_is_scaled_by_its_base():
    plain = make()
    of_base = logits(plain)
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj"]))
    scale_rope(model, 256)
    other = make()
    scale_rope(other, 256)
    assert torch.equal(logits(model), logits(other)) and not torch.equal(logits(model), of_base)
    restore_rope(model)
    assert torch.equal(logits(model), of_base)
    assert plain.config.max_position_embeddings == 64

"""S2-Attn without LongLoRA: full fine-tuning, (IA)3 and DoRA on a model that `configure_attention` has switched."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_longlora import LongLoraConfig, configure_attention, scale_rope, use_attention
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention import forward as attention
from peft_longlora.attention.settings import settings_of
from tests.helpers.architectures import GROUP, Truth
from tests.helpers.releases import CACHE
from tests.helpers.tiny import IDS, logits, make, train

METHODS = {
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


def truth_of(folder, ids) -> torch.Tensor:
    """Logits by the dense-mask definition of S2-Attn, on plain transformers."""
    Truth.local, Truth.segment_ids = (), torch.ones_like(ids)
    return logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="truth"), ids)


def assert_sparse(model, folder):
    """In training mode the definition of S2-Attn, in evaluation plain transformers; and the two differ."""
    plain = logits(AutoModelForCausalLM.from_pretrained(folder))
    sparse = truth_of(folder, IDS)
    torch.testing.assert_close(logits(model.train()), sparse, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(model.eval()), plain, rtol=1e-3, atol=1e-3)
    assert (sparse - plain).abs().max() > 0.1


def extended(rope_type="yarn"):
    model = make()
    scale_rope(model, 128, rope_type=rope_type)
    configure_attention(model, group_size=GROUP)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_another_adapter_on_top(method, tmp_path):
    model = train(get_peft_model(extended(), METHODS[method]))
    adapted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(extended(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), adapted)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_sparse(model, tmp_path / "merged")


def test_full_fine_tuning_with_the_plain_trainer(tmp_path):
    model = extended()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = TrainingArguments(
        tmp_path / "run", max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [dict(input_ids=row, labels=row) for row in IDS.tolist() * 3]
    Trainer(model, args, train_dataset=data).train()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    model.save_pretrained(tmp_path / "model")
    assert_sparse(model, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="s2_attn")
    configure_attention(again, group_size=GROUP)
    torch.testing.assert_close(logits(again.train()), truth_of(tmp_path / "model", IDS), rtol=1e-3, atol=1e-3)


def test_a_model_loaded_by_name_alone_is_sparse_with_the_defaults(tmp_path):
    """attn_implementation="s2_attn" and nothing else: a quarter of the window."""
    make(max_position_embeddings=4 * GROUP).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="s2_attn")
    assert_sparse(model, tmp_path)


def test_modes_hold_on_top_of_another_adapter():
    model = get_peft_model(extended(), METHODS["lora"]).eval()
    dense, sparse = logits(model), logits(model.train())
    with use_attention(model, "dense"):
        assert torch.equal(logits(model), dense)
    with use_attention(model.eval(), "sparse"):
        assert torch.equal(logits(model), sparse)
    with model.disable_adapter():  # of another method: the attention is the model's own and stays
        assert torch.equal(logits(model.train()), sparse)


def test_a_chosen_backend_stays_when_adapters_come():
    model = make()
    configure_attention(model, backend="sdpa")
    peft_model = get_peft_model(model, LongLoraConfig(context_length=256))
    peft_model.add_adapter("second", LongLoraConfig(context_length=256))
    assert {settings_of(module).backend for module in find_attention_modules(model).values()} == {"sdpa"}
    configure_attention(model, backend="flex")
    assert {settings_of(module).backend for module in find_attention_modules(model).values()} == {"flex"}


def test_prefix_tuning_is_dense_and_says_so(monkeypatch):
    """A prefix is a cache in front of every row, which no group covers."""

    def prefixed(model):
        torch.manual_seed(1)
        return get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))

    stock, model = prefixed(make()), make()
    configure_attention(model, group_size=GROUP)
    model = prefixed(model)
    said = []
    monkeypatch.setattr(attention.logger, "warning_once", said.append)
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    assert torch.equal(loss, stock.train()(input_ids=IDS, labels=IDS).loss)
    assert "4 cached tokens stand in front of the 96 to train on" in said[0] and "trains dense" in said[0]
    assert torch.equal(model.eval()(input_ids=IDS).logits, stock.eval()(input_ids=IDS).logits)
    loss.backward()
    said.clear()
    with torch.no_grad():  # decoding with a cache is no training, whatever the mode
        start = model.train().base_model(input_ids=IDS[:, :40], use_cache=True)
        model.base_model(input_ids=IDS[:, 40:50], **{CACHE: start[CACHE]})
    assert not said


def test_prompt_tuning_is_sparse():
    """Virtual tokens are tokens: the row is so much longer."""
    model = make()
    configure_attention(model, group_size=GROUP)
    model = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).train()
    found = model(input_ids=IDS).logits
    prompt = model.get_prompt(len(IDS))
    base = model.get_base_model()
    rows = torch.cat((prompt, base.get_input_embeddings()(IDS)), dim=1)
    assert torch.equal(found, base(inputs_embeds=rows, use_cache=False).logits)
    with use_attention(model, "dense"):
        assert (model(input_ids=IDS).logits - found).abs().max() > 0.1

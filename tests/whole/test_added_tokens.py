"""Adapters on a base with added tokens, such as the original LongLoRA's [PAD]: no tensor twice, and they load."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments

from tests.helpers.tiny import IDS, extend, logits, make, train

TOKENS = 100  # 97 and three more
NEW_IDS = torch.cat((IDS, torch.arange(97, TOKENS).repeat(2, 1)), dim=1)
WEIGHTS = "adapter_model.safetensors"
LORA = dict(target_modules=["q_proj", "embed_tokens"], train_embeddings=False)
EMBEDDINGS = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"
# of the base, of the adapter; what the file holds of embeddings and output layer
CASES = {
    "trained": ({}, {}, {f"{EMBEDDINGS}.weight", f"{EMBEDDINGS}.original_module.weight", f"{HEAD}.weight"}),
    "trained, tied": (
        dict(tie_word_embeddings=True),
        {},
        {f"{name}{part}.weight" for name in (EMBEDDINGS, HEAD) for part in ("", ".original_module")},
    ),
    "frozen": ({}, dict(train_embeddings=False), {f"{EMBEDDINGS}.weight", f"{HEAD}.weight"}),
    "frozen, tied": (
        dict(tie_word_embeddings=True),
        dict(train_embeddings=False),
        {f"{EMBEDDINGS}.weight", f"{HEAD}.weight"},
    ),
    "LoRA": (
        {},
        LORA,
        {f"{EMBEDDINGS}.base_layer.weight", f"{EMBEDDINGS}.lora_embedding_A", f"{EMBEDDINGS}.lora_embedding_B"},
    ),
}


def load_base(folder, tokens=TOKENS, case=""):
    """The base from its folder with its vocabulary resized; every time the new rows are other ones."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[97:] = 0
        # Beside LoRA on the embeddings PEFT saves no output layer, so its new rows must be the same there.
        for layer in (model.get_input_embeddings(), *([] if case == "LoRA" else [model.get_output_embeddings()])):
            layer.weight[97:] = torch.randn_like(layer.weight[97:])
    return model


def of_embeddings(folder) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / WEIGHTS)
    return {name: tensor for name, tensor in tensors.items() if name.startswith((EMBEDDINGS, HEAD))}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("how", ["auto", True])
@pytest.mark.parametrize("case", CASES)
def test_adapters_of_a_resized_base_load_and_hold_no_tensor_twice(case, how, tmp_path):
    changes, settings, saved = CASES[case]
    make(**changes).save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", case=case)
    of_base = logits(base, NEW_IDS)
    model = train(extend(base, **settings))
    adapted = logits(model, NEW_IDS)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=how)
    tensors = of_embeddings(tmp_path / "adapter")
    assert tensors.keys() == saved
    assert {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("weight")} == {TOKENS}

    loaded = PeftModel.from_pretrained(load_base(tmp_path / "base", case=case), tmp_path / "adapter")
    assert torch.equal(logits(loaded, NEW_IDS), adapted)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, NEW_IDS), of_base)
    if Version(transformers.__version__) >= Version("5.18"):  # before, it is refused
        bare = load_base(tmp_path / "base", case=case)
        bare.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits(bare, NEW_IDS), adapted)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again, NEW_IDS), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_files_with_three_copies_load(tmp_path):
    """As peft-longlora wrote them before it renamed what PEFT saves."""
    make().save_pretrained(tmp_path / "base")
    model = train(extend(load_base(tmp_path / "base")))
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    tensors[f"{EMBEDDINGS}.modules_to_save.weight"] = tensors[f"{EMBEDDINGS}.weight"].clone()
    save_file(tensors, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(load_base(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded, NEW_IDS), logits(model, NEW_IDS))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("settings", [{}, dict(train_embeddings=False)])
def test_a_base_of_another_size_is_refused_with_both_sizes(settings, tmp_path):
    make().save_pretrained(tmp_path / "base")
    extend(load_base(tmp_path / "base"), **settings).save_pretrained(tmp_path / "adapter")
    base = load_base(tmp_path / "base", 97)
    before = logits(base)
    with pytest.raises(ValueError, match=r"(?s)100.*97.*resize_token_embeddings"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(base), before)


def words(tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer that knows so many words."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"w{index}": index for index in range(tokens)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), pad_token="w0"
    )


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_a_trainer_saves_with_its_tokenizer_loads_by_its_folder_alone(tmp_path):
    make().save_pretrained(tmp_path / "base")
    args = TrainingArguments(
        tmp_path / "run", max_steps=2, save_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [dict(input_ids=row, labels=row) for row in NEW_IDS.tolist() * 2]
    model = extend(load_base(tmp_path / "base"))
    trainer = Trainer(model, args, train_dataset=data, processing_class=words(TOKENS))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    wanted = logits(model.eval(), NEW_IDS)
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["vocab_size"] == TOKENS
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == TOKENS
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")  # resizes the base for the tokenizer
    assert torch.equal(logits(loaded.eval(), NEW_IDS), wanted)
    resumed = Trainer(extend(load_base(tmp_path / "base")), args, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert resumed.state.global_step == 2

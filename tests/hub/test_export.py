"""Out of our format and into it: plain LoRA adapters for servers, and the original project's adapters."""

import json
import os
import re
import shlex

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_longlora import LongLoraConfig, scale_rope
from peft_longlora.hub.export import export_lora
from peft_longlora.hub.original import convert_original_adapter
from tests.helpers.configs import tiny_llama_config
from tests.helpers.every_config import tiny_model
from tests.helpers.original import write_original

TOKENS = torch.arange(3, 83)[None]


def adapt(base_folder, **fields) -> PeftModel:
    torch.manual_seed(3)
    base = LlamaForCausalLM.from_pretrained(base_folder, attn_implementation="s2_attn")
    config = LongLoraConfig(**{"r": 2, "context_length": 256, "init_lora_weights": False, **fields})
    model = get_peft_model(base, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "ntk"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_exported_adapter_is_plain_lora_and_its_card_says_how_to_load_it(base_folder, tmp_path, rope_type, use_dora):
    model = adapt(base_folder, rope_type=rope_type, train_embeddings=False, train_norms=False, use_dora=use_dora)
    folder = export_lora(model, tmp_path / "plain")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["modules_to_save"] is None
    assert not config.keys() & {"context_length", "rope_type", "applied_rope_parameters", "group_size"}
    text = (folder / "README.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    assert torch.equal(logits(names["model"]), logits(model))
    if use_dora:
        assert "vllm serve" not in text and "vLLM takes no adapter with use_dora=True: serve the merged model" in text
    else:
        server = shlex.split(re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1])
        assert json.loads(server[server.index("--hf-overrides") + 1]) == names["overrides"]
        assert server[server.index("--max-lora-rank") + 1] == "8", "of the ranks that vLLM takes, the first above r=2"
    # Without what the card says, another model answers.
    plain = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_folder), folder)
    assert not torch.allclose(logits(plain), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_norms_are_folded_into_a_base_or_refused(tmp_path, tied):
    LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")
    model = adapt(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"trained tensors that are not LoRA's, .*Give fold_into=FOLDER"):
        export_lora(model, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    before = logits(model)
    export_lora(model, tmp_path / "plain", fold_into=tmp_path / "folded")
    assert torch.equal(logits(model), before), "the model in memory is as it was"
    base = LlamaForCausalLM.from_pretrained(PeftConfig.from_pretrained(tmp_path / "plain").base_model_name_or_path)
    assert base.config.tie_word_embeddings == tied
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "plain")), before)


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_in_bfloat16_is_folded_in_bfloat16(tmp_path, tied):
    """The copies are trained in float32: what is written has the base's precision, and is checked as it is written."""
    LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=tied)).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapt(str(tmp_path / "base"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    export_lora(model, tmp_path / "plain", fold_into=tmp_path / "folded")
    written = load_file(tmp_path / "folded" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in written) is not tied
    base = LlamaForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.bfloat16)
    plain = PeftModel.from_pretrained(base, tmp_path / "plain")
    torch.testing.assert_close(logits(plain).float(), logits(model).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "trained, fold",
    [
        (dict(modules_to_save=["lm_head"]), True),
        (dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True), False),
        (dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True), True),
    ],
    ids=["a copy of one", "LoRA of both", "LoRA of both, folded"],
)
def test_what_is_trained_of_a_tied_base_is_exported(tmp_path, trained, fold):
    """One of the two may have changed; then the base that is written is untied, and the one in memory is not."""
    LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    model = adapt(str(tmp_path / "base"), train_embeddings=False, train_norms=False, **trained)
    before = logits(model)
    export_lora(model, tmp_path / "plain", fold_into=tmp_path / "folded" if fold else None)
    assert model.config.tie_word_embeddings and torch.equal(logits(model), before)
    base = LlamaForCausalLM.from_pretrained(tmp_path / ("folded" if fold else "base"))
    if not fold:
        scale_rope(base, model.peft_config["default"].context_length)
    assert base.config.tie_word_embeddings == ("modules_to_save" not in trained)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "plain")), before)


def test_replicated_layers_are_in_no_base(tmp_path, base_folder):
    model = adapt(base_folder, train_embeddings=False, train_norms=False, layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ValueError, match=r"layer_replication=\[\[0, 2\], \[1, 2\]\]: .*Leave fold_into out"):
        export_lora(model, tmp_path / "plain", fold_into=tmp_path / "folded")
    assert not (tmp_path / "plain").exists() and not (tmp_path / "folded").exists()


def test_an_init_that_changed_the_base_is_refused(base_folder, tmp_path):
    model = adapt(base_folder, init_lora_weights="pissa", train_embeddings=False, train_norms=False)
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa' changed the base's own weights.*Merge instead"):
        export_lora(model, tmp_path / "plain")


@pytest.fixture
def original(tmp_path):
    """An adapter in the original's layout, for a base of 512 tokens and 97 words, and the model it came from."""
    LlamaForCausalLM(tiny_llama_config(max_position_embeddings=512)).save_pretrained(tmp_path / "base")
    model = adapt(str(tmp_path / "base"), rope_type="linear", context_length=2048)
    write_original(model, tmp_path / "Llama-2-7b-longlora-2k")
    return tmp_path / "Llama-2-7b-longlora-2k", model


TINY = {"base_context_length": 512, "vocab_size": 97}


def test_original_adapter_becomes_ours_with_equal_logits(original, tmp_path, caplog):
    folder, model = original
    config = convert_original_adapter(folder, tmp_path / "ours", **TINY)
    assert (config.context_length, config.rope_type) == (2048, "linear")
    assert config.applied_rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert not list((tmp_path / "ours").glob("*.bin"))
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "ours")), logits(model))
    assert "from 512 to **2,048 tokens**" in (tmp_path / "ours" / "README.md").read_text()


def test_rows_appended_for_padding_are_dropped_and_said(original, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("peft_longlora.hub.original.logger.warning", said.append)
    convert_original_adapter(original[0], tmp_path / "ours", **TINY)
    assert len(said) == 1 and re.search(r"embed_tokens.weight has 98 rows, the base has 97.*are dropped", said[0])
    with pytest.raises(ValueError, match=r"has 98 rows, but the base has 99. Give the base's own vocab_size"):
        convert_original_adapter(original[0], tmp_path / "more", base_context_length=512, vocab_size=99)


@pytest.mark.parametrize("name", ["adapter_model.bin", "trainable_params.bin"])
def test_a_pickle_with_code_is_refused_and_never_run(original, tmp_path, name):
    folder, _ = original
    trap = tmp_path / "trap"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {trap}",)

    torch.save({"weight": Malicious()}, folder / name)
    with pytest.raises(ValueError, match=rf"{name} is refused: .*do not open it with weights_only=False"):
        convert_original_adapter(folder, tmp_path / "ours", **TINY)
    assert not trap.exists() and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04"])
def test_a_damaged_pickle_is_refused(original, tmp_path, content):
    (original[0] / "adapter_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model.bin is refused: it is damaged, or"):
        convert_original_adapter(original[0], tmp_path / "ours", **TINY)


@pytest.mark.parametrize(
    ("name", "window"),
    [("Llama-2-7b-longlora-8k", 8192), ("Llama-2-7b-longlora-100k-ft", 102400), ("Llama-2-70b-longlora-32k", 32768)],
)
def test_window_from_the_published_names(original, tmp_path, name, window):
    folder = original[0].rename(tmp_path / name)
    config = convert_original_adapter(folder, tmp_path / "ours", **TINY)
    assert config.context_length == window
    assert config.applied_rope_parameters["factor"] == window / 512


def test_factor_given_and_rounded_up_as_the_original_does(original, tmp_path):
    folder = original[0].rename(tmp_path / "adapter")
    config = convert_original_adapter(folder, tmp_path / "ours", context_length=1100, **TINY)
    assert (config.context_length, config.applied_rope_parameters["factor"]) == (1536, 3.0)
    config = convert_original_adapter(folder, tmp_path / "ours", factor=2.5, **TINY)
    assert (config.context_length, config.applied_rope_parameters["factor"]) == (1280, 2.5)
    with pytest.raises(ValueError, match=r"factor=2.5 and context_length=1280 say the same"):
        convert_original_adapter(folder, tmp_path / "ours", factor=2.5, context_length=1280, **TINY)
    with pytest.raises(ValueError, match="factor=1 is not above 1"):
        convert_original_adapter(folder, tmp_path / "ours", factor=1, **TINY)


def test_a_base_that_is_nowhere_is_said(original, tmp_path, monkeypatch):
    """The published adapters name a folder of their authors' machine."""
    said = []
    monkeypatch.setattr("peft_longlora.hub.original.logger.warning", said.append)
    path = original[0] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/models/Llama-2-7b-hf"}))
    convert_original_adapter(original[0], tmp_path / "ours", **TINY)
    assert "names the base '/models/Llama-2-7b-hf', which is neither a folder here" in said[-1]
    said.clear()
    config = convert_original_adapter(original[0], tmp_path / "ours", base_model=str(tmp_path / "base"), **TINY)
    assert len(said) == 1 and config.base_model_name_or_path == str(tmp_path / "base")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udc80"])
def test_a_damaged_config_is_refused(original, tmp_path, content):
    (original[0] / "adapter_config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"adapter_config.json (is damaged|holds a list)"):
        convert_original_adapter(original[0], tmp_path / "ours", **TINY)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin", "trainable_params.bin"])
def test_a_link_out_of_the_folder_is_refused(original, tmp_path, name):
    (original[0] / name).rename(tmp_path / name)
    (original[0] / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a link to .*Put the file itself there"):
        convert_original_adapter(original[0], tmp_path / "ours", **TINY)
    assert not (tmp_path / "ours").exists()


def test_what_is_missing_is_said(original, tmp_path):
    folder = original[0].rename(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"does not have its window in its name.* Give context_length"):
        convert_original_adapter(folder, tmp_path / "ours", **TINY)
    with pytest.raises(ValueError, match="context_length=256 is not above the base's window of 512"):
        convert_original_adapter(folder, tmp_path / "ours", context_length=256, **TINY)
    with pytest.raises(ValueError, match="nowhere': no such folder, and no id on the Hub"):
        convert_original_adapter(tmp_path / "nowhere", tmp_path / "ours")
    (folder / "trainable_params.bin").unlink()
    with pytest.raises(ValueError, match=r"no trainable_params.bin in it. So it is not an adapter of the original"):
        convert_original_adapter(folder, tmp_path / "ours", context_length=2048, **TINY)


def test_the_default_rope_theta_is_that_of_transformers_llama():
    assert convert_original_adapter.__kwdefaults__["rope_theta"] == LlamaConfig().rope_parameters["rope_theta"]


def test_an_adapter_that_is_switched_off_is_not_exported(base_folder, tmp_path):
    """Inside the block the model has its base's RoPE, which the card and the folded base would get."""
    model = adapt(base_folder, train_embeddings=False, train_norms=False)
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match=r"switched off.*outside of model.disable_adapter\(\)"),
    ):
        export_lora(model, tmp_path / "lora", fold_into=tmp_path / "whole")
    assert not (tmp_path / "lora").exists() and not (tmp_path / "whole").exists()


def _file(path):
    path.write_text("a person's notes")


def _longlora(path):
    LongLoraConfig().save_pretrained(path)


PLACES = {
    "a file": (_file, r"folder='.*place': .*place is a file"),
    "inside a file": (lambda path: _file(path.parent), r"folder='.*place': .* is a file"),
    "a folder named as a file": (lambda path: (path / "README.md").mkdir(parents=True), r"README.md is a folder"),
    "our adapter": (_longlora, r"holds an adapter of another type, which would be overwritten"),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("name", ["folder", "fold_into"])
def test_a_place_that_cannot_take_the_export_is_refused_and_kept(base_folder, tmp_path, case, name):
    make, message = PLACES[case]
    place = tmp_path / "in" / "place"
    place.parent.parent.mkdir(exist_ok=True)
    if case != "inside a file":
        place.parent.mkdir()
    make(place)
    before = sorted(tmp_path.rglob("*"))
    model = adapt(base_folder, train_embeddings=False, train_norms=False)
    places = {"folder": tmp_path / "lora", "fold_into": tmp_path / "base", name: place}
    with pytest.raises(ValueError, match=message.replace("folder=", f"{name}=")):
        export_lora(model, **places)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_folder_is_not_both_adapter_and_base(base_folder, tmp_path):
    model = adapt(base_folder, train_embeddings=False, train_norms=False)
    with pytest.raises(ValueError, match="folder and fold_into are both"):
        export_lora(model, tmp_path / "one", fold_into=tmp_path / "one")


def test_a_persons_readme_stays_in_the_folder_of_an_export(base_folder, tmp_path):
    (tmp_path / "README.md").write_text("# Notes of a person\n")
    export_lora(adapt(base_folder, train_embeddings=False, train_norms=False), tmp_path)
    assert "# Notes of a person" in (tmp_path / "README.md").read_text()
    export_lora(adapt(base_folder, train_embeddings=False, train_norms=False), tmp_path / "new")
    export_lora(adapt(base_folder, train_embeddings=False, train_norms=False), tmp_path / "new")  # the same again
    assert "Notes of a person" not in (tmp_path / "new" / "README.md").read_text()


def test_two_active_adapters_are_not_exported_as_one(base_folder, tmp_path):
    model = adapt(base_folder, train_embeddings=False, train_norms=False)
    model.add_adapter("b", LongLoraConfig(r=2, context_length=256, train_embeddings=False, train_norms=False))
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match=r"\['default', 'b'\] are active, and one is exported at a time"):
        export_lora(model, tmp_path / "lora")


def test_a_base_without_positions_is_told_only_the_window(tmp_path):
    model = get_peft_model(
        tiny_model("jamba"), LongLoraConfig(r=2, context_length=256, train_embeddings=False, train_norms=False)
    )
    model.get_base_model().config.name_or_path = str(tmp_path / "base")
    text = (export_lora(model, tmp_path / "plain") / "README.md").read_text()
    server = shlex.split(re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1])
    assert json.loads(server[server.index("--hf-overrides") + 1]) == {"max_position_embeddings": 256}
    assert "has no position embeddings" in text and "must be loaded with these" not in text

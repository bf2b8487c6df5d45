"""Damaged files of an adapter, a model and a tokenizer: one ValueError that names the place, whatever the libraries
raise."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_longlora import LongLoraConfig
from peft_longlora.adapter import regexes
from peft_longlora.hub import loading
from peft_longlora.hub.loading import load_model
from tests.helpers.evaluated import longlora, save_base
from tests.helpers.tiny import extend

DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
LONG = '{"r": ' + "9" * 5000 + "}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with its tokenizer; on it a LongLoRA and a plain LoRA adapter."""
    folder = tmp_path_factory.mktemp("whole")
    base = save_base(folder / "base")
    extend(load_model(base, device="cpu").model, context_length=256).save_pretrained(folder / "longlora")
    get_peft_model(load_model(base, device="cpu").model, LoraConfig(target_modules=["q_proj"])).save_pretrained(
        folder / "lora"
    )
    return folder


@pytest.fixture
def copied(folders, tmp_path):
    """A copy to break."""
    shutil.copytree(folders, tmp_path / "copied")
    return tmp_path / "copied"


def change(path, fields) -> None:
    """Write these fields into a JSON file, or this text instead of it."""
    path.write_text(fields if isinstance(fields, str) else json.dumps({**json.loads(path.read_text()), **fields}))


FIELDS = [
    (DEEP, "adapter_config.json is damaged: the JSON is nested too deeply. Get it again"),
    (LONG, "adapter_config.json is damaged: Exceeds the limit"),
    ({"r": "2"}, "r='2' must be a whole number, 1 or more"),
    ({"lora_alpha": "8"}, "lora_alpha='8' must be a finite number"),
    ({"lora_dropout": [0]}, "lora_dropout=[0] must be a number, 0 or more and below 1"),
    ({"modules_to_save": [{"a": 1}]}, "modules_to_save=[{'a': 1}] must be a list of names"),
    ({"target_modules": [["a"]]}, "target_modules=[['a']] must be a list of names, a regular expression"),
    ({"rank_pattern": 3}, "rank_pattern=3 must map names of modules to whole numbers"),
    ({"alpha_pattern": {"a": "b"}}, "alpha_pattern={'a': 'b'} must map names of modules to numbers"),
    ({"target_modules": "((("}, "'(((' in this adapter's config cannot be used: it is no regular expression"),
    ({"corda_config": 3}, "corda_config=3 must be one of PEFT's configs, the dict of its fields, or None"),
    ({"use_bdlora": True}, "use_bdlora=True must be one of PEFT's configs"),
    ({"monteclora_config": {"a": 1}}, "monteclora_config={'a': 1} cannot be read:"),
    ({"kasa_config": {"beta": "x"}}, "kasa_config={'beta': 'x'} cannot be read:"),
    ({"arrow_config": {}}, "arrow_config={} routes between stock LoRA adapters"),
    ({"megatron_config": {"a": 1}}, "megatron_config={'a': 1} is for layers of Megatron-LM"),
    ({"init_lora_weights": 3}, "init_lora_weights=3 must be True, False, or the name of an initialisation"),
    ({"layers_to_transform": "x"}, "layers_to_transform='x' must be a layer's index"),
    ({"layer_replication": [1]}, "layer_replication=[1] must be a list of pairs of layer indices"),
    ({"target_parameters": "x"}, "target_parameters='x' must be a list of names, or None"),
    ({"bias": "wat"}, "bias='wat' is unknown. Use one of 'none', 'all', 'lora_only'"),
    ({"peft_type": "WAT"}, "peft_type='WAT' is unknown. It must be one of "),
    ({"peft_type": [1]}, "peft_type=[1] is unknown. It must be one of "),
]


@pytest.mark.parametrize(("fields", "said"), FIELDS, ids=[said[:40] for _, said in FIELDS])
def test_a_wrong_value_of_an_adapter_is_named(copied, fields, said):
    change(copied / "longlora" / "adapter_config.json", fields)
    with pytest.raises(ValueError) as raised:
        load_model(str(copied / "base"), str(copied / "longlora"), device="cpu")
    assert str(raised.value).startswith(f"adapter={str(copied / 'longlora')!r}")
    assert said in str(raised.value) and len(str(raised.value)) < 1500


@pytest.mark.parametrize(
    "pattern, said", [("(((", "it is no regular expression"), (r"([\w.]+)+!", "take longer than 1 s on this model's")]
)
def test_a_pattern_in_an_adapter_of_another_type_is_tried_first(copied, monkeypatch, pattern, said):
    """PEFT would match it for ever."""
    monkeypatch.setattr(regexes, "SECONDS", 1)
    change(copied / "lora" / "adapter_config.json", {"target_modules": pattern})
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        load_model(str(copied / "base"), str(copied / "lora"), device="cpu")
    assert str(raised.value).startswith(f"adapter={str(copied / 'lora')!r} cannot be loaded on ")


@pytest.mark.parametrize("fields", [{"r": "2"}, {"lora_alpha": "8"}, {"rank_pattern": 3}])
def test_what_peft_cannot_read_in_its_own_adapters_is_a_value_error_too(copied, fields):
    change(copied / "lora" / "adapter_config.json", fields)
    with pytest.raises(ValueError, match=r"cannot be loaded on .*damaged or holds a value of a wrong type") as raised:
        load_model(str(copied / "base"), str(copied / "lora"), device="cpu")
    assert str(copied / "lora") in str(raised.value) and not isinstance(raised.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("file", "fields", "what", "said"),
    [
        ("tokenizer.json", "[]", "tokenizer", "damaged or holds a value of a wrong type"),
        ("config.json", DEEP, "model", "RecursionError"),
        ("config.json", {"num_hidden_layers": "x"}, "model", "num_hidden_layers"),
    ],
)
def test_a_damaged_file_of_a_model_is_one_line_and_code_2(copied, tmp_path, capsys, file, fields, what, said):
    change(copied / "base" / file, fields)
    with pytest.raises(ValueError, match=f"^{what}='.*' cannot be loaded: ") as raised:
        load_model(str(copied / "base"), device="cpu")
    assert said in str(raised.value) and raised.value.__cause__ is not None
    capsys.readouterr()
    command = ["eval", "--model", copied / "base", "--tasks", "passkey", "--output", tmp_path / "out"]
    assert longlora(*command) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert said in line


def test_a_model_that_lacks_weights_is_refused(copied):
    """transformers warns and makes random ones, which a chat would answer with and an evaluation measure."""
    file = copied / "base" / "model.safetensors"
    weights = load_file(file)
    lost = "model.layers.0.mlp.down_proj.weight"
    save_file({name: each for name, each in weights.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^model='.*' cannot be loaded: its files lack 1 of its weights, .*{lost}"):
        load_model(str(copied / "base"), device="cpu")
    save_file({**weights, "model.more.weight": weights[lost].clone()}, file, metadata={"format": "pt"})
    [note] = load_model(str(copied / "base"), device="cpu").notes
    assert "The files of 'base' hold 1 weights that the model does not use (model.more.weight, ...)" in note


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_what_is_no_fault_of_a_file_stays_what_it_is(folders, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(loading.AutoTokenizer, "from_pretrained", fail)
        load_model(str(folders / "base"), device="cpu")
    with pytest.raises(type(error)):
        monkeypatch.setattr(loading.PeftModel, "from_pretrained", fail)
        load_model(str(folders / "base"), str(folders / "longlora"), device="cpu")


def test_a_folder_without_a_tokenizer_is_said_in_a_whole_sentence(folders, tmp_path):
    with pytest.raises(ValueError, match=r"^tokenizer='.*' cannot be loaded: .*one of: \S+"):
        load_model(str(folders / "base"), tokenizer=str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("content", "said"), [(DEEP, "nested too deeply"), (LONG, "Exceeds the limit"), ('{"peft_type": "WAT"}', "'WAT'")]
)
def test_a_config_that_cannot_be_read_names_its_file(tmp_path, content, said):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError) as raised:
        LongLoraConfig.from_pretrained(str(tmp_path))
    assert str(tmp_path / "adapter_config.json") in str(raised.value) and said in str(raised.value)

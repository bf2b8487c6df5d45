"""Adapter folders that are damaged or belong to another base: one clear error, and a base model left as it was."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_longlora import LongLoraConfig
from tests.helpers.tiny import assert_same, extend, make, snapshot, train

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    train(extend(make(), dense_layers=[0])).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(adapter, tmp_path) -> Path:
    """A copy to break."""
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def truncate(folder: Path, size: int | None = None):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2 if size is None else size])


def link(folder: Path, name: str):
    """Put a file elsewhere and a link to it in its place."""
    elsewhere = folder.parent / f"{folder.name} elsewhere"
    elsewhere.mkdir()
    (folder / name).rename(elsewhere / name)
    (folder / name).symlink_to(elsewhere / name)


def edit(folder: Path, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def set_config(folder: Path, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
COUNTED = "base_model.model.s2_training_forwards"
NORM = "base_model.model.model.norm.weight"
EMBEDDINGS = "base_model.model.model.embed_tokens.weight"

# how the folder is broken, changes of the base, what the message names
BREAKS = {
    "truncated": (truncate, {}, [WEIGHTS, "damaged"]),
    "header cut": (lambda f: truncate(f, 20), {}, [WEIGHTS, "damaged"]),
    "empty": (lambda f: truncate(f, 0), {}, [WEIGHTS, "0 bytes", "damaged"]),
    "weights elsewhere": (lambda f: link(f, WEIGHTS), {}, [WEIGHTS, "is a link to", "Put the file itself there"]),
    "config elsewhere": (lambda f: link(f, CONFIG), {}, [CONFIG, "is a link to", "Put the file itself there"]),
    "no LoRA tensor": (lambda f: edit(f, lambda t: t.pop(QUERY)), {}, [WEIGHTS, "lacks 1 of", QUERY]),
    "no norm": (lambda f: edit(f, lambda t: t.pop(NORM)), {}, [WEIGHTS, "lacks 1 of", NORM]),
    "no embeddings": (lambda f: edit(f, lambda t: t.pop(EMBEDDINGS)), {}, [WEIGHTS, "lacks 1 of", EMBEDDINGS]),
    "extra tensor": (
        lambda f: edit(f, lambda t: t.update({QUERY.replace("q_proj", "z_proj"): torch.zeros(4, 32)})),
        {},
        [WEIGHTS, "holds 1 tensors", "z_proj"],
    ),
    "other rank": (
        lambda f: edit(f, lambda t: t.update({QUERY: torch.zeros(8, 32)})),
        {},
        [WEIGHTS, QUERY, "(8, 32)", "(4, 32)"],
    ),
    "not a number": (
        lambda f: edit(f, lambda t: t[QUERY][0].fill_(float("nan"))),
        {},
        [WEIGHTS, QUERY, "not finite", "take an earlier checkpoint"],
    ),
    "infinite": (lambda f: edit(f, lambda t: t[NORM][:1].fill_(float("inf"))), {}, [WEIGHTS, NORM, "not finite"]),
    "whole numbers": (
        lambda f: edit(f, lambda t: t.update({QUERY: t[QUERY].int()})),
        {},
        [WEIGHTS, QUERY, "torch.int32"],
    ),
    "a broken count": (lambda f: edit(f, lambda t: t.update({COUNTED: torch.tensor([2.5])})), {}, [COUNTED, "[2.5]"]),
    "a negative count": (lambda f: edit(f, lambda t: t.update({COUNTED: torch.tensor([-5])})), {}, [COUNTED, "[-5]"]),
    "two counts": (
        lambda f: edit(f, lambda t: t.update({COUNTED: torch.tensor([1, 2])})),
        {},
        [COUNTED, "[1, 2]", "one whole number of training forwards", "take an earlier checkpoint"],
    ),
    "hidden size": (None, dict(hidden_size=48, head_dim=8), [WEIGHTS, "base_model.model.model.", "32", "48"]),
    "vocabulary": (None, dict(vocab_size=101), ["97 tokens", "has 101"]),
    "more layers": (None, dict(num_hidden_layers=3), [WEIGHTS, "lacks", "layers.2."]),
    "fewer layers": (None, dict(num_hidden_layers=1), [WEIGHTS, "no place for", "layers.1."]),
    "head size": (None, dict(head_dim=16), ["head_dim=8", "has 16"]),
    "window": (None, dict(max_position_embeddings=32), ["window of 64 tokens", "has 32"]),
    "tied base": (None, dict(tie_word_embeddings=True), [WEIGHTS, "lacks 1 of", "lm_head"]),
    "other architecture": (None, dict(model_type="gpt_neox"), ["target_modules"]),
    "unknown layer": (lambda f: set_config(f, dense_layers=[7]), {}, ["dense_layers", "[7]"]),
    "a rank beyond memory": (lambda f: set_config(f, r=2**20), {}, [WEIGHTS, "r=1048576", "above 32"]),
    "bad rope": (lambda f: set_config(f, applied_rope_parameters={"rope_type": "spiral"}), {}, ["spiral"]),
}


# `load_adapter` of transformers reads config and weights by itself, so only what the config tells is refused there.
BY_CONFIG = ("vocabulary", "window", "head size")
if Version(transformers.__version__) >= Version("5.18"):  # before that, it is refused for losing embeddings and norms
    BY_CONFIG += ("other architecture", "unknown layer", "bad rope")
DOORS = [
    (name, door)
    for name, (_, changes, _) in BREAKS.items()
    for door in ("PeftModel", "second adapter", "transformers")
    if (door != "second adapter" or not changes) and (door != "transformers" or name in BY_CONFIG)
]


@pytest.mark.parametrize("name, door", DOORS)
def test_a_folder_that_does_not_fit_is_refused_and_the_base_is_untouched(name, door, folder, adapter):
    break_it, changes, parts = BREAKS[name]
    if break_it is not None:
        break_it(folder)
    model = make(**changes)
    if door == "second adapter":
        peft_model = PeftModel.from_pretrained(model, adapter, adapter_name="first")
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        if door == "second adapter":
            peft_model.load_adapter(folder, adapter_name="second")
        elif door == "PeftModel":
            PeftModel.from_pretrained(model, folder)
        else:
            model.load_adapter(str(folder))
    for part in parts:
        assert part in str(error.value), f"{part!r} not in {error.value}"
    assert_same(snapshot(model), before)
    if door == "second adapter":
        assert list(peft_model.peft_config) == ["first"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("[]", "holds a list, not the object that PEFT writes"),
        ("null", "holds a NoneType"),
        ("", "is damaged: Expecting value"),
        ("{}", "names no peft_type"),
        ('{"peft_type": null}', "names no peft_type"),
        ('{"peft_type": "LONGLORA", "self": 1}', "cannot be read: TypeError: .*multiple values for argument 'self'"),
        ('{"peft_type": "longlora"}', "peft_type='longlora' is unknown"),
    ],
)
def test_a_config_file_that_is_no_config_is_refused(text, said, tmp_path):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=f"{CONFIG}.* {said}"):
        LongLoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", '{"peft_type": "lora"}', '{"peft_type": "LORA", "self": 1}'])
def test_another_adapter_of_a_model_is_read_with_the_name_of_its_file(text, adapter, tmp_path):
    """PEFT's own reader ends in a TypeError or KeyError that names none."""
    model = PeftModel.from_pretrained(make(), adapter)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / CONFIG}"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]


def test_weights_that_come_in_another_way_are_looked_at_too(adapter):
    model = PeftModel.from_pretrained(make(), adapter)
    with pytest.raises(ValueError, match=f"{QUERY} holds numbers that are not finite"):
        set_peft_model_state_dict(model, {**load_file(adapter / WEIGHTS), QUERY: torch.full((4, 32), float("nan"))})


def test_the_links_of_the_hubs_cache_are_taken(adapter, tmp_path):
    """There every file of a snapshot is a link to a blob beside it."""
    repository = tmp_path / "models--me--adapter"
    snapshot_folder = repository / "snapshots" / "abc"
    snapshot_folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in adapter.iterdir():
        (repository / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot_folder / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    PeftModel.from_pretrained(make(), snapshot_folder)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_the_folder_itself_is_sound(adapter, low_cpu_mem_usage):
    """Or the refusals above would prove nothing."""
    model = PeftModel.from_pretrained(make(), adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    for name, tensor in load_file(adapter / WEIGHTS).items():
        parts = name.rsplit(".", 1)
        found = [
            t for n, t in model.named_parameters() if n.replace(".default", "").replace(".modules_to_save", "") == name
        ]
        assert len(found) == 1 and torch.equal(found[0].cpu(), tensor), parts


def test_a_base_with_a_resized_vocabulary_is_taken(tmp_path):
    model = make()
    model.resize_token_embeddings(110)
    train(extend(model)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vocabulary of 110 tokens.*has 97.*resize_token_embeddings\(110\)"):
        PeftModel.from_pretrained(make(), tmp_path)
    resized = make()
    resized.resize_token_embeddings(110)
    PeftModel.from_pretrained(resized, tmp_path)


def test_a_wish_for_a_tie_that_the_base_lacks_is_refused_before_training():
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"ensure_weight_tying=True, but .* not tied .*Leave ensure_weight_tying out"):
        extend(model, ensure_weight_tying=True)
    assert_same(snapshot(model), before)


def test_an_adapter_of_a_tied_base_is_refused_on_an_untied_one(tmp_path):
    """PEFT would write the trained embeddings over the output layer of the base."""
    train(extend(make(tie_word_embeddings=True))).save_pretrained(tmp_path)
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match="tied to the output layer, but this model's are not"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_same(snapshot(model), before)

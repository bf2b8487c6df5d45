"""What tells two runs apart: every byte of weights, the tokenizer, its template; and nothing that changes no number."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peft_longlora import configure_attention
from peft_longlora.eval import identity
from peft_longlora.eval.identity import (
    Digests,
    device_name,
    fingerprint,
    model_digest,
    template_digest,
    tokenizer_digest,
)
from peft_longlora.eval.subject import Subject
from tests.helpers.answering_models import letter_tokenizer
from tests.helpers.paths import EMBEDDED
from tests.helpers.tiny import extend, make


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
        (folder / name).write_bytes(os.urandom(3 * 2**20))
    return folder


def test_a_folder_is_what_sha256sum_says(folder):
    """The documented command, by hand."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    assert fingerprint(str(folder), Digests()) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("place", [0, 2**20 + 17, 3 * 2**20 - 1])
@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json"])
def test_every_byte_counts(folder, place, name):
    before = fingerprint(str(folder), Digests())
    with (folder / name).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    assert fingerprint(str(folder), Digests()) != before


def test_what_is_no_part_of_the_model_does_not_count(folder):
    before = fingerprint(str(folder), Digests())
    for name in ("README.md", "results.json", "trainer_state.json", "tokenizer.json", "passkey.png"):
        (folder / name).write_text("{}")
    assert fingerprint(str(folder), Digests()) == before


def test_files_are_read_once_until_they_change(folder, tmp_path, monkeypatch):
    read, plain = [], identity.sha256
    monkeypatch.setattr(identity, "sha256", lambda file: read.append(file.name) or plain(file))
    found = [fingerprint(str(folder), Digests(tmp_path / "digests.json")) for _ in range(3)]
    assert len(set(found)) == 1 and sorted(read) == ["config.json", "model-1.safetensors", "model-2.safetensors"]
    about = (folder / "config.json").stat()
    with (folder / "config.json").open("r+b") as file:
        file.write(b"changed")
    os.utime(folder / "config.json", ns=(about.st_atime_ns, about.st_mtime_ns))  # as `cp -p` and rsync do
    assert fingerprint(str(folder), Digests(tmp_path / "digests.json")) != found[0] and read[3:] == ["config.json"]
    (tmp_path / "digests.json").write_text("{")
    assert fingerprint(str(folder), Digests(tmp_path / "digests.json")) == fingerprint(str(folder), Digests())


def test_a_model_of_the_hub_is_its_commit():
    assert fingerprint("me/none", Digests(), "abc") == "abc"
    with pytest.raises(ValueError, match="me/none is not a folder"):
        fingerprint("me/none", Digests())


def tokenizer(**options):
    return AutoTokenizer.from_pretrained(EMBEDDED, **options)


def test_a_tokenizer_is_what_it_does(tmp_path):
    plain = tokenizer_digest(tokenizer())
    shutil.copytree(EMBEDDED, tmp_path / "copy")
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "copy")) == plain, "its place is no part of it"
    used = tokenizer()
    used("a b c " * 50, truncation=True, max_length=5, padding="max_length")
    assert tokenizer_digest(used) == plain, "nor what it was last asked"
    more, other = tokenizer(), tokenizer(eos_token="<bos>")
    more.add_tokens(["new"])
    assert len({plain, tokenizer_digest(more), tokenizer_digest(other)}) == 3
    assert template_digest(more) == template_digest(used)
    more.chat_template = "{{ messages[0]['content'] }}"
    assert tokenizer_digest(more) != plain and template_digest(more) not in (None, template_digest(used))


def test_a_tokenizer_without_an_unknown_token_has_a_digest_too():
    """It refuses texts that it does not hold, such as one that tokenizers are tried with."""

    def words(*known: str):
        table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="?"))
        return PreTrainedTokenizerFast(tokenizer_object=table)

    assert tokenizer_digest(words("a", "b")) == tokenizer_digest(words("a", "b")) != tokenizer_digest(words("b", "a"))


def test_a_model_in_memory_is_all_that_it_computes_with():
    seen = set()

    def see(model) -> None:
        digest, elsewhere = model_digest(model)
        assert digest not in seen and not elsewhere
        seen.add(digest)

    see(make())
    assert model_digest(make())[0] in seen
    told = make()
    told.config.use_cache = not told.config.use_cache
    assert model_digest(told)[0] in seen
    weight, buffer = make(), make()
    with torch.no_grad():
        weight.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-6
        buffer.model.rotary_emb.inv_freq[1] *= 1.001
    see(weight)
    see(buffer)
    see(make(dtype=torch.bfloat16))
    tuned = extend(make())
    see(tuned)
    next(m for m in tuned.modules() if isinstance(getattr(m, "scaling", None), dict)).scaling["default"] *= 2
    see(tuned)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"]),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_an_adapter_that_is_switched_off_is_another_model(config):
    model = get_peft_model(make(), config)
    on = model_digest(model)[0]
    with model.disable_adapter():
        assert model_digest(model)[0] != on
    assert model_digest(model)[0] == on


def test_how_a_model_in_memory_attends_is_part_of_it():
    """What `use_attention(model, "sparse")` computes with, and which kernel computes the rest."""

    def described(name: str, attention: str = "dense", **settings) -> str:
        model = make()
        model.set_attn_implementation(name)
        if settings:
            configure_attention(model, **{"group_size": 16, **settings})
        return json.dumps(Subject.of(model, letter_tokenizer(), attention).description)

    sparse = [{"pattern": "s2"}, {"pattern": "local"}, {"group_size": 8}, {"dense_layers": [0]}, {"dense_layers": [1]}]
    sparse += [{"group_size": None, "pattern": "adaptive", "chosen_blocks": count} for count in (1, 2)]
    found = [described("s2_attn", "sparse", **settings) for settings in sparse]
    found += [described(name) for name in ("sdpa", "eager")]
    assert len(set(found)) == len(found)
    assert described("s2_attn", group_size=16) == described("sdpa"), "dense, it is what stock computes"


def test_the_precision_of_products_is_part_of_the_device():
    device, before = torch.device("cpu"), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        exact = device_name(device)
        torch.set_float32_matmul_precision("medium")
        assert device_name(device) == f"{exact}, float32 products of medium precision"
    finally:
        torch.set_float32_matmul_precision(before)


def test_tensors_that_are_elsewhere_are_named():
    model = make()
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.to("meta"))
    assert model_digest(model)[1] == ["model.norm.weight"]

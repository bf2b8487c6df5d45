"""An adapter goes out and comes back over HTTP: two processes and a hub on 127.0.0.1 (see conftest.py)."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import runpy
import sys
import tempfile
from unittest import mock

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from peft_longlora import LongLoraConfig
from peft_longlora.hub.original import convert_original_adapter
from peft_longlora.hub.push import push_adapter
from peft_longlora.hub.readme import BEGIN
from tests.helpers.adapters_on_hub import (
    CODE,
    TOKENS,
    is_ours,
    logits,
    new_adapter,
    pull,
    push_private,
    push_with_card,
    run_card,
)
from tests.helpers.configs import tiny_llama_config
from tests.helpers.hub_process import Failure
from tests.helpers.original import write_original
from tests.helpers.paths import EXAMPLES
from tests.helpers.releases import has_own_adapters, own_adapters

# -- a round trip ------------------------------------------------------------------------------------------------------


def train_on(repo_id, new_id):
    base = LlamaForCausalLM.from_pretrained("me/base", attn_implementation="s2_attn")
    model = PeftModel.from_pretrained(base, repo_id, is_trainable=True)
    before = logits(model)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    push_adapter(model, new_id)
    return before, losses, logits(model)


def read_tensor_names(repo_id):
    return sorted(HfApi().parse_safetensors_file_metadata(repo_id, "adapter_model.safetensors").tensors)


def test_push_here_pull_and_train_on_there(pushed, pusher, puller):
    code, pulled = puller(run_card, "me/adapter")
    assert code.startswith("import peft_longlora")
    assert pulled == pushed
    before, losses, after = puller(train_on, "me/adapter", "me/trained-on")
    assert before == pushed
    assert losses[0] > losses[1] > losses[2]
    assert pusher(pull, "me/trained-on") == after != before


def test_the_pushed_card(hub, pushed):
    card = ModelCard(hub.files("me/adapter")["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": "me/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "llama2",  # the base's, since none was given
        "datasets": ["me/books"],
        "language": ["en"],
        "tags": ["base_model:adapter:me/base", "longlora", "lora", "peft", "transformers"],
    }
    config = json.loads(hub.files("me/adapter")["adapter_config.json"])
    assert json.dumps(config["applied_rope_parameters"], sort_keys=True) in card.text
    assert "from 64 to **256 tokens**" in card.text
    assert "https://huggingface.co/datasets/me/books" in card.text


def test_large_files_go_by_lfs_and_come_back_in_ranges(hub, pusher, puller):
    hub.lfs.clear()
    pusher(push_private, "me/large")
    names = puller(read_tensor_names, "me/large")
    content = hub.files("me/large")["adapter_model.safetensors"]
    assert content in hub.lfs.values()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert names == sorted(header.keys() - {"__metadata__"})
    assert any("adapter_model" in path and "range" in headers for _, path, headers in hub.requests)


def test_private_needs_the_token(pushed, puller):
    failure = puller(pull, "me/adapter", token="hf_wrong", revision="main")
    assert isinstance(failure, Failure)
    assert "me/adapter" in failure.message


def longalpaca_records() -> list[dict]:
    """In the layout of LongAlpaca-12k: one list, where long records name a file and short ones have an input."""
    words = ["a", "model", "reads", "the", "whole", "paper", "then", "answers", "what", "was", "asked"]
    long = [
        {
            "instruction": " ".join(words[(i * j) % len(words)] for j in range(60 * i)),
            "output": f"Answer: {words[i]}.",
            "file": f"{i}.pdf",
        }
        for i in range(1, 5)
    ]
    return [*long, {"instruction": "Name the word.", "input": "", "output": "paper"}]


def run_longalpaca(*data):
    """What examples/sft_longalpaca.py prints."""
    script = EXAMPLES / "sft_longalpaca.py"
    settings = {"--model": "me/coder", "--max-length": 512, "--max-steps": 2, "--accumulation": 1, "--eval-records": 1}
    settings |= {"--learning-rate": 1e-2, "--warmup-steps": 1, "--output": tempfile.mkdtemp()}
    arguments = [str(part) for setting in settings.items() for part in setting]
    argv = mock.patch.object(sys, "argv", [str(script), *arguments, "--data", *data])
    path = mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path])  # as `python examples/...` has it
    with argv, path, contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(script), run_name="__main__")
    return [line for line in printed.getvalue().splitlines() if "held out" in line or "Loss" in line]


@pytest.mark.slow
def test_the_longalpaca_example_by_ids_alone(hub, puller, coder, tmp_path):
    """Model and data from the hub: the numbers are those of the same records in a file."""
    records = tmp_path / "LongAlpaca-12k.json"
    records.write_text(json.dumps(longalpaca_records()))
    hub.put("Yukang/LongAlpaca-12k", {records.name: records.read_bytes()}, kind="dataset")
    printed = puller(run_longalpaca, "Yukang/LongAlpaca-12k")
    assert printed[0] == "4 rows to train on, 1 held out"
    assert [line.partition(",")[0] for line in printed[1:]] == [
        "Loss of held-out answers before",
        "Loss of held-out answers after",
    ]
    assert printed == puller(run_longalpaca, str(records))
    assert any(path.startswith("/datasets/Yukang/LongAlpaca-12k/resolve/") for _, path, _ in hub.requests)


def test_an_adapter_of_the_original_project_by_its_id(hub, pusher, tmp_path):
    LlamaForCausalLM(tiny_llama_config()).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="s2_attn")
    model = get_peft_model(base, LongLoraConfig(r=2, context_length=2048, rope_type="linear"))
    write_original(model, tmp_path / "original")
    files = {path.name: path.read_bytes() for path in (tmp_path / "original").iterdir()}
    hub.put("me/Llama-2-7b-longlora-2k", {**files, "run.sh": b"exit 1"})
    arguments = {"base_context_length": 64, "vocab_size": 97, "base_model": "me/base"}
    config = pusher(convert_original_adapter, "me/Llama-2-7b-longlora-2k", tmp_path / "ours", **arguments)
    assert (config.context_length, config.base_model_name_or_path) == (2048, "me/base")
    assert (tmp_path / "ours" / "adapter_model.safetensors").is_file()
    assert not [path for _, path, _ in hub.requests if path.endswith("run.sh")]


# -- which calls leave our card ----------------------------------------------------------------------------------------


def push_plain(repo_id, made_by):
    """Nothing but what the libraries' own documentation shows."""
    model = new_adapter()
    if made_by != "get_peft_model":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            if made_by == "from_pretrained":
                model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("me/base"), folder)
            elif made_by == "deepcopy":
                model, original = copy.deepcopy(model), model
                for parameter in original.parameters():
                    parameter.data.zero_()
            else:
                model = LlamaForCausalLM.from_pretrained("me/base")
                model.add_adapter(LongLoraConfig(r=2, context_length=256, init_lora_weights=False))
    model.push_to_hub(repo_id)
    return logits(model)


@pytest.mark.parametrize(
    "made_by", ["get_peft_model", "from_pretrained", "deepcopy", pytest.param("add_adapter", marks=own_adapters)]
)
def test_push_to_hub_of_a_model_needs_nothing_said(hub, pusher, puller, made_by):
    repo_id = f"me/plain-{made_by}"
    pushed = pusher(push_plain, repo_id, made_by)
    assert hub.repos["model", repo_id].messages == ["initial commit", "Upload adapter"]
    assert is_ours(hub.files(repo_id)["README.md"])
    assert puller(run_card, repo_id)[1] == pushed


def push_others(repo_id):
    """Other adapters and plain models push as their libraries do, and so does a model that lost its adapter."""
    plain = LlamaForCausalLM.from_pretrained("me/base")
    get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"])).push_to_hub(f"{repo_id}-lora")
    if has_own_adapters:
        once = LlamaForCausalLM.from_pretrained("me/base")
        once.add_adapter(LongLoraConfig(r=2, context_length=256))
        once.delete_adapter("default")
        once.push_to_hub(f"{repo_id}-once")
    new_adapter().merge_and_unload().push_to_hub(f"{repo_id}-merged")


def test_nobody_elses_push_is_changed(hub, pusher):
    assert pusher(push_others, "me/others") is None
    for name in ("lora", "once", "merged") if has_own_adapters else ("lora", "merged"):
        assert BEGIN not in hub.files(f"me/others-{name}")["README.md"].decode()
        assert name == "lora" or "model.safetensors" in hub.files(f"me/others-{name}")


def test_model_push_to_hub_with_our_card(hub, pusher):
    oid = pusher(push_with_card, "me/carded", tags=["books"])
    repo = hub.repos["model", "me/carded"]
    assert oid == repo.branches["main"]
    assert repo.messages == ["initial commit", "Upload adapter"], "card and weights arrive in one commit"
    assert "books" in ModelCard(repo.files()["README.md"].decode()).data.tags
    pusher(push_with_card, "me/carded", revision="next", commit_message="For later")
    assert is_ours(repo.files("next")["README.md"])
    pusher(push_with_card, "me/carded", create_pr=True)
    assert [name for name in repo.branches if name.startswith("refs/pr/")]
    assert oid == repo.branches["main"]


def count_writes(repo_id):
    from peft_longlora.hub import card

    with mock.patch.object(card, "write_whole", side_effect=card.write_whole) as write:
        new_adapter().push_to_hub(repo_id)
    return write.call_count


def test_a_push_writes_its_card_once(hub, pusher):
    assert pusher(count_writes, "me/once") == 1
    assert 'adapter = "me/once"' in hub.files("me/once")["README.md"].decode()


def test_nobody_is_asked_who_the_user_is(hub, pusher, pushed):
    assert not [path for _, path, _ in hub.requests if "whoami" in path]


def test_text_on_the_hub_stays(hub, pusher):
    mine = "---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n\nI wrote this.\n"
    hub.put("me/mine", {"README.md": mine.encode()})
    pusher(push_with_card, "me/mine")
    card = ModelCard(hub.files("me/mine")["README.md"].decode())
    assert card.text.strip() == "# Mine\n\nI wrote this."
    assert card.data.license == "mit"
    assert {"mine", "longlora", "base_model:adapter:me/base"} <= set(card.data.tags)


def push_two_adapters(repo_id):
    model = new_adapter()
    model.add_adapter("second", LongLoraConfig(r=3, context_length=256))
    push_adapter(model, repo_id)
    model.set_adapter("second")
    return logits(model)


def test_a_second_adapter_has_a_card_of_its_own(hub, pusher, puller):
    pushed = pusher(push_two_adapters, "me/two")
    files = hub.files("me/two")
    assert "r = 2" in files["README.md"].decode() and "r = 3" in files["second/README.md"].decode()
    assert 'subfolder="second"' in CODE.search(files["second/README.md"].decode())[1]
    assert puller(pull, "me/two", subfolder="second") == pushed

"""An adapter goes out and comes back over HTTP: two processes and a hub on 127.0.0.1 (loopback_hub.py).

The processes stay for the whole file, since starting one costs more than all the tests. huggingface_hub reads its
environment when it is imported, so what talks to the hub runs there; the hub itself runs here, where tests look at it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import resource
import runpy
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, get_token, hf_hub_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peft_longlora import LongLoraConfig
from peft_longlora.hub.card import BEGIN
from peft_longlora.hub.original import convert_original_adapter
from peft_longlora.hub.trainers import push_adapter, push_card, use_longlora_card
from tests.helpers.configs import tiny_llama_config
from tests.helpers.hub_process import Failure, answer, start_process
from tests.helpers.loopback_hub import LoopbackHub
from tests.helpers.original import write_original
from tests.helpers.paths import EMBEDDED, EXAMPLES
from tests.helpers.releases import has_own_adapters, own_adapters

TOKENS = torch.arange(3, 63).view(2, 30)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        torch.manual_seed(1)
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(tiny_llama_config()).save_pretrained(folder)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        server.put("me/base", {**files, "README.md": b"---\nlicense: llama2\n---\nA base.\n"})
        yield server
    assert not server.unknown, "huggingface_hub made calls that the loopback hub does not know"


@pytest.fixture(scope="module")
def processes(hub, tmp_path_factory):
    both = [start_process(hub, tmp_path_factory.mktemp(name)) for name in ("pusher", "puller")]
    yield both
    for process in both:
        process.shutdown()


@pytest.fixture(scope="module")
def pusher(processes):
    return lambda function, *args, **kwargs: processes[0].submit(answer, function, *args, **kwargs).result()


@pytest.fixture(scope="module")
def puller(processes):
    return lambda function, *args, **kwargs: processes[1].submit(answer, function, *args, **kwargs).result()


def new_adapter(**fields) -> PeftModel:
    model = LlamaForCausalLM.from_pretrained("me/base", attn_implementation="s2_attn")
    config = LongLoraConfig(**{"r": 2, "context_length": 256, "init_lora_weights": False, **fields})
    return get_peft_model(model, config)


def logits(model) -> list:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.tolist()


# -- a round trip ------------------------------------------------------------------------------------------------------


def push_private(repo_id):
    torch.manual_seed(2)
    model = new_adapter(rope_type="linear")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    use_longlora_card(model, datasets="me/books", language="en")
    model.push_to_hub(repo_id, private=True)
    return logits(model)


def run_card(repo_id):
    """What a reader of the card does: run its first code block as it stands."""
    code = CODE.search(Path(hf_hub_download(repo_id, "README.md")).read_text())[1]
    names = {}
    exec(code, names)
    return code, logits(names["model"])


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


def pull(repo_id, **kwargs):
    return logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("me/base"), repo_id, **kwargs))


def read_tensor_names(repo_id):
    return sorted(HfApi().parse_safetensors_file_metadata(repo_id, "adapter_model.safetensors").tensors)


@pytest.fixture(scope="module")
def pushed(pusher):
    """The logits of the model whose adapter is me/adapter."""
    return pusher(push_private, "me/adapter")


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


def test_large_files_go_by_lfs_and_come_back_in_ranges(hub, pushed, puller):
    names = puller(read_tensor_names, "me/adapter")
    content = hub.files("me/adapter")["adapter_model.safetensors"]
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
    with argv, contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(script), run_name="__main__")
    return [line for line in printed.getvalue().splitlines() if "record" in line or "Loss" in line]


@pytest.fixture(scope="module")
def coder(hub, tmp_path_factory):
    """On the hub: a tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("coder")
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    LlamaForCausalLM(tiny_llama_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hub.put("me/coder", {path.name: path.read_bytes() for path in folder.iterdir()})
    return "me/coder"


def test_the_longalpaca_example_by_ids_alone(hub, puller, coder, tmp_path):
    """Model and data from the hub: the numbers are those of the same records in a file."""
    records = tmp_path / "LongAlpaca-12k.json"
    records.write_text(json.dumps(longalpaca_records()))
    hub.put("Yukang/LongAlpaca-12k", {records.name: records.read_bytes()}, kind="dataset")
    printed = puller(run_longalpaca, "Yukang/LongAlpaca-12k")
    assert printed[0] == "5 records read, 4 to train on, 1 held out"
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


def is_ours(content: bytes) -> bool:
    return BEGIN in content.decode() and "base_model:adapter:me/base" in ModelCard(content.decode()).data.tags


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


def push_with_card(repo_id, **kwargs):
    model = new_adapter()
    use_longlora_card(model)
    info = model.push_to_hub(repo_id, **kwargs)
    return info.oid


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


def train(repo_id, kind, with_card, strategy="every_save", name=None):
    """Train for two steps and push: what stood in the README of each folder when the Trainer pushed is on the hub."""
    folder = Path(tempfile.mkdtemp()) / (name or repo_id.split("/")[1])
    settings = {
        **{"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1, "report_to": [], "use_cpu": True},
        **{"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True},
        **{"output_dir": str(folder), "disable_tqdm": True, "hub_model_id": repo_id},
    }
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": TOKENS.tolist(), "labels": TOKENS.tolist()})
    if kind == "add_adapter":
        model = LlamaForCausalLM.from_pretrained("me/base", attn_implementation="s2_attn")
        model.add_adapter(LongLoraConfig(r=2, context_length=256, init_lora_weights=False))
    else:
        model = new_adapter()
    if kind == "sft":
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer

        words = Tokenizer(models.WordLevel({str(i): i for i in range(97)}, unk_token="0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="0")
        args = SFTConfig(**settings, bf16=False, packing=True, max_length=32)
        trainer = SFTTrainer(model, args=args, train_dataset=rows.remove_columns("labels"), processing_class=tokenizer)
    else:
        trainer = Trainer(model, TrainingArguments(**settings), train_dataset=rows)
    if with_card:
        use_longlora_card(trainer, license="mit", datasets=["me/books"])
    trainer.add_callback(WaitForPush(trainer))
    trainer.train()
    trainer.push_to_hub(commit_message="The end")
    if kind == "sft" and not with_card:
        model.push_to_hub(repo_id, commit_message="Once more")
    return str(folder), logits(model)


class WaitForPush(TrainerCallback):
    """Steps this short would overwrite the files of the push before, which runs in the background."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_save(self, *args, **kwargs) -> None:
        if self.trainer.push_in_progress:
            self.trainer.push_in_progress.wait_until_done()


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_trainers_push_our_card_at_every_save(hub, pusher, kind):
    failure = pusher(train, f"me/{kind}", kind, with_card=True)
    assert not isinstance(failure, Failure), failure
    repo = hub.repos["model", f"me/{kind}"]
    assert repo.messages[1:] == ["Training in progress, step 1", "Training in progress, step 2", "The end"]
    for commit in list(repo.commits.values())[1:]:
        card = ModelCard(commit["README.md"].decode())
        assert is_ours(commit["README.md"])
        assert (card.data.license, card.data.datasets) == ("mit", ["me/books"])
        assert f'adapter = "me/{kind}"' in CODE.search(card.text)[1]
    assert kind != "sft" or "trl" in card.data.tags


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("trainer", "every_save"),
        ("trainer", "checkpoint"),
        ("trainer", "end"),
        pytest.param("add_adapter", "every_save", marks=own_adapters),
        pytest.param("trainer", "all_checkpoints", marks=pytest.mark.slow),
        pytest.param("add_adapter", "checkpoint", marks=(pytest.mark.slow, own_adapters)),
        pytest.param("add_adapter", "end", marks=(pytest.mark.slow, own_adapters)),
    ],
)
def test_a_plain_trainer_needs_nothing_said(hub, pusher, puller, kind, strategy):
    repo_id = f"me/silent-{kind}-{strategy}"
    answer = pusher(train, repo_id, kind, with_card=False, strategy=strategy)
    assert not isinstance(answer, Failure), answer
    folder, trained = answer
    repo = hub.repos["model", repo_id]
    steps = [m for m in repo.messages if m.startswith("Training in progress")]
    assert len(steps) == {"every_save": 2, "end": 0}.get(strategy, 4)
    cards = [(p, f) for c in list(repo.commits.values())[1:] for p, f in c.items() if p.endswith("README.md")]
    assert cards and all(is_ours(content) for _, content in cards), [path for path, _ in cards]
    assert all("README.md" in commit for commit in list(repo.commits.values())[1:] if "adapter_config.json" in commit)
    last = ModelCard(repo.files()["README.md"].decode())
    assert "generated_from_trainer" in last.data.tags and last.data.license == "llama2"
    assert "model-index" not in last.data.to_dict(), "nothing was evaluated"
    code, pulled = puller(run_card, repo_id)
    assert code.startswith("import peft_longlora") and f'adapter = "{repo_id}"' in code
    assert pulled == trained and folder not in last.text


@pytest.mark.slow
def test_a_trainers_repository_of_an_organisation_is_found(hub, pusher, puller):
    """The Trainer tells the model the repository's name alone; here it is neither the user's nor the folder's."""
    assert not isinstance(pusher(train, "we/of-us", "trainer", with_card=False, strategy="end", name="out"), Failure)
    assert 'adapter = "we/of-us"' in puller(run_card, "we/of-us")[0]
    hub.put("me/twice", {"README.md": b""})
    folder, _ = pusher(train, "we/twice", "trainer", with_card=False, strategy="end")
    assert f'adapter = "{folder}"' in hub.files("we/twice")["README.md"].decode(), "never another's"
    hub.fail("GET", "/api/whoami", 500, times=99)
    folder, _ = pusher(train, "me/nameless", "trainer", with_card=False, strategy="end")
    hub.faults.clear()
    assert f'adapter = "{folder}"' in hub.files("me/nameless")["README.md"].decode(), "no reason to end a training"


def test_trl_drafts_last_and_is_mended(hub, pusher):
    """If this fails because TRL's trainers keep our card by now: simplify hub.py and the README."""
    answer = pusher(train, "me/trl", "sft", with_card=False)
    assert not isinstance(answer, Failure), answer
    repo = hub.repos["model", "me/trl"]
    by_message = dict(zip(repo.messages, repo.commits.values(), strict=True))
    assert is_ours(by_message["Training in progress, step 2"]["README.md"])
    assert not is_ours(by_message["The end"]["README.md"])
    assert is_ours(by_message["Once more"]["README.md"])
    hub.put("me/trl", by_message["The end"])
    pusher(push_card, "me/trl", license="mit")
    assert is_ours(hub.files("me/trl")["README.md"])


# -- faults ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk():
    """Files may grow to 4 kB here: the kernel refuses the rest of a write, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def push_on_small_disk(repo_id):
    model = new_adapter()
    use_longlora_card(model)
    with small_disk():
        model.push_to_hub(repo_id)


def pull_on_small_disk(repo_id, cache):
    base = LlamaForCausalLM.from_pretrained("me/base")
    with small_disk():
        PeftModel.from_pretrained(base, repo_id, cache_dir=cache)


FAULTS = {
    "connection dropped amid an upload": ("PUT", "/lfs/", "drop", 99, "RuntimeError"),
    "401 at the commit": ("POST", "/commit/", 401, 1, "HfHubHTTPError"),
    "409 at the commit": ("POST", "/commit/", 409, 1, "HfHubHTTPError"),
    "500 at the commit": ("POST", "/commit/", 500, 99, "HfHubHTTPError"),
    "500 at the upload": ("PUT", "/lfs/", 500, 99, "RuntimeError"),
    "a disk full at the hub": ("PUT", "/lfs/", 507, 99, "RuntimeError"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_push_announces_nothing_and_the_next_one_completes_it(hub, pusher, puller, name):
    *fault, error = FAULTS[name]
    repo_id = f"me/{name.replace(' ', '-')}"
    hub.lfs.clear()
    hub.fail(*fault)
    failure = pusher(push_with_card, repo_id)
    hub.faults.clear()
    assert isinstance(failure, Failure) and error in failure.types, failure
    assert hub.files(repo_id).keys() == {".gitattributes"}
    assert isinstance(pusher(push_with_card, repo_id), str)
    assert is_ours(hub.files(repo_id)["README.md"])
    assert not isinstance(puller(pull, repo_id), Failure)


def test_one_dropped_connection_is_the_clients_own_business(hub, pusher):
    hub.lfs.clear()
    hub.fail("PUT", "/lfs/", "drop", times=1)
    assert isinstance(pusher(push_with_card, "me/hiccup"), str)
    assert not hub.faults
    assert is_ours(hub.files("me/hiccup")["README.md"])


def test_no_disk_left_for_a_push(hub, pusher):
    failure = pusher(push_on_small_disk, "me/full")
    assert isinstance(failure, Failure) and "too large" in failure.message.lower(), failure
    assert hub.files("me/full").keys() == {".gitattributes"}
    assert isinstance(pusher(push_with_card, "me/full"), str)


def test_no_disk_left_for_a_pull(pushed, puller, tmp_path):
    failure = puller(pull_on_small_disk, "me/adapter", str(tmp_path))
    assert isinstance(failure, Failure) and "OSError" in failure.types, failure
    assert not isinstance(puller(pull, "me/adapter", cache_dir=str(tmp_path)), Failure)


# -- bad input ---------------------------------------------------------------------------------------------------------


def push_without_token(repo_id):
    model = new_adapter()
    use_longlora_card(model)
    token = os.environ.pop("HF_TOKEN")
    try:
        assert get_token() is None
        model.push_to_hub(repo_id)
    finally:
        os.environ["HF_TOKEN"] = token


def load_logits_and_base(repo_id):
    """The base's logits after an adapter that does not load."""
    base = LlamaForCausalLM.from_pretrained("me/base")
    before = logits(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failure = answer(PeftModel.from_pretrained, base, repo_id)
    return failure, [str(w.message) for w in caught], logits(base) == before


def test_no_token(hub, pusher):
    failure = pusher(push_without_token, "me/tokenless")
    assert "LocalTokenNotFoundError" in failure.types and "hf auth login" in failure.message, failure
    assert ("model", "me/tokenless") not in hub.repos


@pytest.mark.parametrize(
    ("repo_id", "names", "message"),
    [
        ("me/none", "RepositoryNotFoundError", "me/none"),
        ("me/../base", "HFValidationError", "me/../base"),
        ("me/base", "ValueError", "me/base holds no adapter_config.json .*it is no adapter. Push one there first"),
        ("me/lora", "ValueError", "me/lora is an adapter of type .*LORA"),
    ],
)
def test_push_card_names_what_it_needs(hub, pusher, repo_id, names, message):
    hub.put("me/lora", {"adapter_config.json": b'{"peft_type": "LORA", "r": 8}'})
    failure = pusher(push_card, repo_id)
    assert names in failure.types, failure
    assert re.search(message, failure.message), failure


def test_push_card_downloads_nothing_that_points_out_of_its_folder(hub, pushed, pusher):
    files = hub.files("me/adapter")
    hub.put("me/paths", {**files, "../evil.png": b"x", "/evil.png": b"x", "plots/inner.png": b"x", "plot.png": b"x"})
    assert not isinstance(pusher(push_card, "me/paths"), Failure)
    assert not [path for _, path, _ in hub.requests if path.endswith(("evil.png", "inner.png"))]
    assert "![plot.png](plot.png)" in hub.files("me/paths")["README.md"].decode()


def changed_adapter(hub, **fields) -> dict[str, bytes]:
    files = hub.files("me/adapter")
    return {**files, "adapter_config.json": json.dumps({**json.loads(files["adapter_config.json"]), **fields}).encode()}


def test_a_newer_format_is_refused(hub, pushed, puller):
    hub.put("me/newer", changed_adapter(hub, format_version=2, field_of_the_future=1))
    failure, _, is_untouched = puller(load_logits_and_base, "me/newer")
    assert "format_version=2" in failure.message and "pip install -U peft-longlora" in failure.message
    assert is_untouched


def test_unknown_keys_are_named(hub, pushed, puller):
    hub.put("me/unknown", changed_adapter(hub, colour="blue"))
    _, messages, _ = puller(load_logits_and_base, "me/unknown")
    assert any("'colour'" in message for message in messages)


def test_a_file_of_no_bytes_is_named_and_the_base_stays(hub, pushed, puller):
    hub.put("me/empty", {**hub.files("me/adapter"), "adapter_model.safetensors": b""})
    failure, _, is_untouched = puller(load_logits_and_base, "me/empty")
    assert "ValueError" in failure.types
    assert re.search(r"adapter_model.safetensors \(0 bytes\) is damaged", failure.message), failure
    assert is_untouched


def load_by_our_door(adapter, with_token=True):
    """What `longlora eval` and `longlora chat` do first."""
    from peft_longlora.hub.loading import load_model

    token = os.environ.pop("HF_TOKEN")
    if with_token:
        os.environ["HF_TOKEN"] = token
    try:
        load_model("me/coder", adapter)
    finally:
        os.environ["HF_TOKEN"] = token


@pytest.mark.parametrize(
    ("adapter", "with_token", "message"),
    [
        ("me/none", True, "no such repository on the Hub. Check the name; .* `hf auth login` or set HF_TOKEN"),
        ("me/hidden", False, "no such repository on the Hub. .* if it is private or gated, log in"),
        ("me/base", True, "no adapter_config.json in that repository; it is no adapter"),
        ("me/../adapter", True, "no such folder, and no id on the Hub"),
        ("../../nowhere", True, "no such folder, and no id on the Hub"),
        ("me/newer", True, "format_version=2: .* pip install -U peft-longlora"),
        ("me/no-bytes", True, r"\(0 bytes\) is damaged: .* Delete .*blobs.*, or load with force_download=True"),
        ("me/no-type", True, "its adapter_config.json names no peft_type.* Get it again"),
        ("me/list", True, "adapter_config.json holds a list.* Get it again"),
        ("me/no-json", True, "adapter_config.json is damaged: .* Get it again"),
    ],
)
def test_the_command_line_says_what_to_do(hub, pushed, puller, coder, adapter, with_token, message):
    hub.put("me/hidden", hub.files("me/adapter"), private=True)
    hub.put("me/newer", changed_adapter(hub, format_version=2))
    hub.put("me/no-bytes", {**hub.files("me/adapter"), "adapter_model.safetensors": b""})
    hub.put("me/no-type", {**hub.files("me/adapter"), "adapter_config.json": b'{"r": 2}'})
    hub.put("me/list", {**hub.files("me/adapter"), "adapter_config.json": b"[1]"})
    hub.put("me/no-json", {**hub.files("me/adapter"), "adapter_config.json": b"{"})
    failure = puller(load_by_our_door, adapter, with_token)
    assert failure.types[0] == "ValueError" and f"--adapter {adapter}" in failure.message, failure
    assert re.search(message, failure.message), failure


def read_config(repo_id):
    return PeftConfig.from_pretrained(repo_id).base_model_name_or_path


def test_code_in_a_config_stays_text(hub, pushed, pusher, tmp_path):
    trap = tmp_path / "trap"
    code = f'x"\nopen({str(trap)!r}, "w")\n#'
    hub.put("me/code", changed_adapter(hub, base_model_name_or_path=code, target_modules=[code, "q_proj"]))
    assert not isinstance(pusher(push_card, "me/code"), Failure)
    block = CODE.search(hub.files("me/code")["README.md"].decode())[1]
    assert "open(" not in block
    assert pusher(read_config, "me/code") == code
    assert not trap.exists()

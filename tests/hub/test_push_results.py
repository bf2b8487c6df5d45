"""A push takes along what lies with the adapter: results, plots and text, from a folder, a model and a Trainer."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import Trainer, TrainingArguments

from peft_longlora import LongLoraConfig
from peft_longlora.cli.main import main
from peft_longlora.hub.card import write_card
from peft_longlora.hub.folder import push_folder
from peft_longlora.hub.push import push_card
from peft_longlora.hub.trainers import use_longlora_card
from tests.helpers.adapters_on_hub import TOKENS, is_ours, new_adapter, run_card
from tests.helpers.hub_process import Failure

ROW = {"task": "perplexity", "dataset": "books", "metric": "perplexity", "length": 256, "value": 7.5}
PLOT = b"\x89PNG of the evaluation"
SHOWN = "| perplexity |  | books | 256 | perplexity | adapter | 7.5 |"


def put_results(folder: Path, value: float = 7.5, weights: str | None = None) -> None:
    """What `longlora eval --card` leaves beside an adapter."""
    weights = weights or hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    content = {"schema_version": 1, "model": {"weights_sha256": weights}, "results": [{**ROW, "value": value}]}
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "perplexity_documents.png").write_bytes(PLOT)
    write_card(LongLoraConfig.from_pretrained(str(folder)), folder)


def save_measured(folder: str) -> None:
    """An adapter with its results, and what a Trainer leaves beside it."""
    torch.manual_seed(3)
    new_adapter(task_type="CAUSAL_LM").save_pretrained(folder)
    put_results(Path(folder))
    for name in ("training_args.bin", ".env", "notes.csv", "tokenizer.json"):
        Path(folder, name).write_bytes(b"x")
    Path(folder, "checkpoint-1").mkdir()


@pytest.fixture(scope="module")
def measured(pusher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measured") / "adapter"
    pusher(save_measured, str(folder))
    assert SHOWN in (folder / "README.md").read_text()
    return folder


def check_measured(files: dict[str, bytes], folder: Path, repo_id: str) -> None:
    for name in ("results.json", "perplexity_documents.png", "adapter_model.safetensors"):
        assert files[name] == (folder / name).read_bytes(), name
    card = ModelCard(files["README.md"].decode())
    assert is_ours(files["README.md"]) and f'adapter = "{repo_id}"' in card.text
    assert SHOWN in card.text and "![perplexity_documents.png]" in card.text and "other weights" not in card.text
    assert [result.metric_value for result in card.data.eval_results] == [7.5]
    assert str(folder) not in card.text


# -- from a folder -----------------------------------------------------------------------------------------------------


def push_by_command(*arguments: str) -> int:
    return main(["push", *arguments])


def test_a_folder_goes_there_in_one_commit(hub, pusher, puller, measured):
    before = {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()}
    assert pusher(push_by_command, str(measured), "me/folder", "--private", "--license", "mit") == 0
    repo, files = hub.repos["model", "me/folder"], hub.files("me/folder")
    assert repo.private and repo.messages == ["initial commit", "Upload adapter"]
    check_measured(files, measured, "me/folder")
    assert "tokenizer.json" in files
    assert not {"training_args.bin", ".env", "notes.csv"} & set(files)
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    assert {path: path.read_bytes() for path in measured.rglob("*") if path.is_file()} == before
    assert not isinstance(puller(run_card, "me/folder"), Failure)


def push_both(folder, repo_id, **options):
    pushed = push_folder(folder, repo_id, **options)
    return pushed.names, pushed.left_out, pushed.notes


def test_what_is_left_out_is_said_and_can_be_included(hub, pusher, measured):
    names, left_out, notes = pusher(push_both, measured, "me/included", include=["*.csv"])
    assert left_out == [".env", "checkpoint-1/", "training_args.bin"] and notes == []
    assert "notes.csv" in names and set(names) <= set(hub.files("me/included"))


def test_text_of_the_disk_and_of_the_hub_is_kept(hub, pusher, measured, tmp_path):
    """A person's text on the disk goes there; on a Hub where a person wrote, that text stays."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in measured.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    with (folder / "README.md").open("a") as file:
        file.write("\n## How I made it\n\nAt night.\n")
    pusher(push_both, folder, "me/text", datasets=["me/books"])
    card = ModelCard(hub.files("me/text")["README.md"].decode())
    assert "At night." in card.text and SHOWN in card.text and card.data.datasets == ["me/books"]
    theirs = "---\nlanguage:\n- en\ntags:\n- theirs\n---\n\n# Mine\n\nWritten on the Hub.\n"
    hub.put("me/theirs", {"README.md": theirs.encode()})
    pusher(push_both, folder, "me/theirs")
    card = ModelCard(hub.files("me/theirs")["README.md"].decode())
    assert card.text.strip() == "# Mine\n\nWritten on the Hub." and card.data.language == ["en"]
    assert {"theirs", "longlora"} <= set(card.data.tags) and card.data.eval_results[0].metric_value == 7.5


def push_and_hear(folder, repo_id, **options):
    with mock.patch("peft_longlora.hub.card.logger.warning") as warning:
        push_folder(folder, repo_id, **options)
    return [call.args[0] for call in warning.mock_calls]


def test_results_of_other_weights_are_said_to_whoever_pushes_them(hub, pusher, measured, tmp_path):
    """Given with --results, or beside weights that were exchanged; the card and its metadata are as they were."""
    assert pusher(push_and_hear, measured, "me/own") == []
    pusher(save_other, str(tmp_path))
    [line] = pusher(push_and_hear, tmp_path, "me/others", results=measured)
    assert "in me/others is of other weights" in line and "metadata leaves these results out" in line
    (tmp_path / "results.json").write_bytes((measured / "results.json").read_bytes())
    assert pusher(push_and_hear, tmp_path, "me/exchanged") == [line.replace("me/others", "me/exchanged")]
    for repo_id, own in (("me/own", True), ("me/others", False), ("me/exchanged", False)):
        card = ModelCard(hub.files(repo_id)["README.md"].decode())
        assert ("model-index" in card.data.to_dict()) == own
        assert ("results of other weights than those here" in card.text) != own


def push_edited(folder, repo_id):
    try:
        push_folder(folder, repo_id)
    except ValueError as error:
        return str(error)


def test_a_value_outside_its_own_interval_is_not_pushed(hub, pusher, measured, tmp_path):
    """Such as one that a person wrote over the one that was measured."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "results.json"):
        (tmp_path / name).write_bytes((measured / name).read_bytes())
    content = json.loads((tmp_path / "results.json").read_text())
    content["results"][0] |= {"low": 7.0, "high": 8.0, "value": 1.5}
    (tmp_path / "results.json").write_text(json.dumps(content))
    said = pusher(push_edited, tmp_path, "me/edited")
    assert "results.json cannot be used for the card" in said and "value must be between low and high in" in said
    assert "README.md" not in hub.files("me/edited")


def push_nowhere(folder):
    with mock.patch("peft_longlora.hub.folder.writing_api", lambda token: HfApi("http://127.0.0.1:9", token="t")):
        return push_both(folder, "me/nowhere")


def test_a_hub_that_is_not_reached_is_said(pusher, measured):
    """With the client of the installed huggingface_hub: httpx in its releases 1, httpx2 in its releases 2."""
    failure = pusher(push_nowhere, measured)
    assert failure.types[0] == "ValueError" and "The Hub is not reached" in failure.message


def test_results_on_the_hub_are_not_lost_to_a_folder_without(hub, pusher, measured, tmp_path):
    """The same weights keep them as theirs; under other weights they are shown as results of others."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((measured / name).read_bytes())
    pusher(push_both, measured, "me/kept")
    pusher(push_both, tmp_path, "me/kept")
    check_measured(hub.files("me/kept"), measured, "me/kept")
    pusher(save_other, str(tmp_path))
    pusher(push_both, tmp_path, "me/kept")
    card = ModelCard(hub.files("me/kept")["README.md"].decode())
    assert "results of other weights than those here" in card.text and SHOWN in card.text
    assert "model-index" not in card.data.to_dict()
    pusher(push_card, "me/kept", license="mit")
    card = ModelCard(hub.files("me/kept")["README.md"].decode())
    assert "results of other weights than those here" in card.text and card.data.license == "mit"


def save_other(folder: str) -> None:
    torch.manual_seed(4)
    new_adapter().save_pretrained(folder)


def test_plots_of_earlier_results_leave_with_them(hub, pusher, measured):
    hub.put("me/plots", {"passkey.png": b"old", "mine.png": b"mine", "results.json": b'{"results": []}'})
    pusher(push_both, measured, "me/plots")
    assert {"mine.png", "perplexity_documents.png"} <= set(hub.files("me/plots"))
    assert "passkey.png" not in hub.files("me/plots")


def test_a_base_in_a_folder_is_said_and_can_be_named(hub, pusher, measured, tmp_path):
    for path in measured.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((measured / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/home/me/base"}))
    (tmp_path / "README.md").unlink()  # it names the base
    _, _, (note,) = pusher(push_both, tmp_path, "me/nowhere")
    assert "'/home/me/base', which is not on the Hub" in note and "base='owner/name'" in note
    assert pusher(push_both, tmp_path, "me/named", base="me/base")[2] == []
    assert json.loads(hub.files("me/named")["adapter_config.json"]) == config
    check_measured(hub.files("me/named"), measured, "me/named")
    # The base is remembered by the Hub, so that a later push without it contradicts nothing.
    _, _, (note,) = pusher(push_both, tmp_path, "me/named")
    assert "The repository, or the card, names 'me/base': this is taken" in note
    assert json.loads(hub.files("me/named")["adapter_config.json"]) == config
    check_measured(hub.files("me/named"), measured, "me/named")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder. Give the folder of an adapter"),
        ({"config.json": b"{}"}, "no adapter_config.json in it, so it is no adapter. It looks like a whole model"),
        ({"adapter_config.json": b"[]"}, "adapter_config.json holds a list, not the object that PEFT writes"),
        ({"adapter_config.json": b'{"peft_type": "longlora"}'}, "adapter_config.json: peft_type='longlora' is unknown"),
        ({"adapter_config.json": b'{"peft_type": "LONGLORA", "self": 1}'}, "adapter_config.json cannot be read: Type"),
        ({"adapter_config.json": b'{"peft_type": "LORA"}'}, "is an adapter of type LORA; only LONGLORA"),
        ({"adapter_config.json": b'{"peft_type": "LONGLORA"}'}, "no adapter_model.safetensors in it"),
    ],
)
def test_what_is_no_adapter_is_refused_before_the_hub_is_asked(hub, pusher, tmp_path, files, message):
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    before = len(hub.requests)
    failure = pusher(push_both, folder, "me/refused")
    assert isinstance(failure, Failure) and "ValueError" in failure.types and message in failure.message
    assert len(hub.requests) == before


def test_what_shall_be_private_is_not_pushed_where_everybody_reads(hub, pusher, measured):
    hub.put("me/public", {"README.md": b"Hello"})
    failure = pusher(push_both, measured, "me/public", private=True)
    assert "me/public exists and is public; private=True is only for a new repository" in failure.message
    assert list(hub.files("me/public")) == ["README.md"]
    hub.put("me/hidden", {"README.md": b"Hello"}, private=True)
    assert "results.json" in pusher(push_both, measured, "me/hidden", private=True)[0]


def test_a_hub_that_refuses_gets_nothing(hub, pusher, measured):
    hub.fail("POST", "/commit/", 403)
    assert "HfHubHTTPError" in pusher(push_both, measured, "me/forbidden").types
    assert hub.repos["model", "me/forbidden"].messages == ["initial commit"]
    assert pusher(push_both, measured, "me/forbidden")[2] == []


# -- from a model ------------------------------------------------------------------------------------------------------


def push_loaded(place: str, repo_id: str, change: float = 0.0) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(place)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += change
    model.push_to_hub(repo_id)


def test_a_loaded_adapter_is_pushed_with_its_results(hub, pusher, measured):
    """What the README recommends after `longlora eval --card`."""
    pusher(push_loaded, str(measured), "me/loaded")
    assert hub.repos["model", "me/loaded"].messages == ["initial commit", "Upload adapter"]
    check_measured(hub.files("me/loaded"), measured, "me/loaded")


def test_an_adapter_of_the_hub_is_pushed_on_with_its_results(hub, pusher, measured):
    pusher(push_loaded, str(measured), "me/first")
    pusher(push_loaded, "me/first", "me/second")
    check_measured(hub.files("me/second"), measured, "me/second")


def test_results_of_a_changed_adapter_are_no_longer_its_own(hub, pusher, measured):
    """Not on a new repository, and not on the one that has them."""
    pusher(push_loaded, str(measured), "me/changed", change=0.1)
    card = ModelCard(hub.files("me/changed")["README.md"].decode())
    assert "None yet." in card.text and "results.json" not in hub.files("me/changed")
    assert "model-index" not in card.data.to_dict()
    pusher(push_loaded, str(measured), "me/changed-later")
    pusher(push_loaded, "me/changed-later", "me/changed-later", change=0.1)
    card = ModelCard(hub.files("me/changed-later")["README.md"].decode())
    assert "results of other weights than those here" in card.text and "model-index" not in card.data.to_dict()


# -- from a Trainer ----------------------------------------------------------------------------------------------------


def push_trained(repo_id: str, then_train: bool = False, with_card: bool = False) -> str:
    """Train, measure what was saved, push; then perhaps train on."""
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": TOKENS.tolist(), "labels": TOKENS.tolist()})
    folder = Path(tempfile.mkdtemp()) / "out"
    settings = dict(max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True)
    args = TrainingArguments(str(folder), hub_model_id=repo_id, save_strategy="no", **settings)
    model = new_adapter()
    trainer = Trainer(model, args, train_dataset=rows)
    if with_card:  # which replaces the trainer's own way to make a card, as TRL's trainers have it
        use_longlora_card(trainer, license="mit")
    trainer.train()
    trainer.save_model()
    put_results(folder)
    if then_train:
        trainer.train()
    trainer.push_to_hub()
    model.push_to_hub(f"{repo_id}-model")  # remembers where it was saved
    return str(folder)


@pytest.mark.slow
def test_a_trainer_pushes_results_and_says_if_they_are_old(hub, pusher):
    folder = Path(pusher(push_trained, "me/trained"))
    files = hub.files("me/trained")
    assert SHOWN in files["README.md"].decode() and "other weights" not in files["README.md"].decode()
    assert files["perplexity_documents.png"] == PLOT and "results.json" in files
    check_measured(hub.files("me/trained-model"), folder, "me/trained-model")
    folder = Path(pusher(push_trained, "me/trained-with-card", with_card=True))
    check_measured(hub.files("me/trained-with-card"), folder, "me/trained-with-card")
    pusher(push_trained, "me/trained-on", then_train=True)
    card = ModelCard(hub.files("me/trained-on")["README.md"].decode())
    assert "results of other weights than those here" in card.text and "model-index" not in card.data.to_dict()

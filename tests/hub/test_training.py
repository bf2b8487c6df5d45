"""`longlora train` with push_to_hub: one commit, with the results that were measured."""

import json

import yaml

from peft_longlora.cli.main import main
from tests.helpers.tiny_base import prose, save_base


def test_a_run_is_pushed_with_its_results(hub, pusher, tmp_path):
    save_base(tmp_path / "base")
    for name, seed in (("books.txt", 0), ("held.txt", 1)):
        (tmp_path / name).write_text(prose(400, seed))
    recipe = dict(
        model=str(tmp_path / "base"), data=str(tmp_path / "books.txt"), eval_data=str(tmp_path / "held.txt"),
        eval_lengths=[128], context_length=128, max_steps=2, output_dir=str(tmp_path / "out"), push_to_hub=True,
        hub_model_id="me/trained", save_steps=1, license="mit",
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert pusher(main, ["train", str(tmp_path / "recipe.yaml")]) == 0
    files = hub.files("me/trained")
    assert files["adapter_model.safetensors"] == (tmp_path / "out/adapter_model.safetensors").read_bytes()
    assert {"adapter_config.json", "results.json", "perplexity_documents.png", "tokenizer.json"} <= files.keys()
    assert not [name for name in files if "checkpoint" in name or name == "run.yaml"]
    assert str(tmp_path).encode() not in files["recipe.yaml"]
    pushed = yaml.safe_load(files["recipe.yaml"])
    assert (pushed["data"], pushed["context_length"], pushed["model"]) == (["books.txt"], 128, "base")
    value = next(r["value"] for r in json.loads(files["results.json"])["results"] if r["task"] == "perplexity")
    card = files["README.md"].decode()
    assert f"{value:.1f}" in card and "license: mit" in card and "me/trained" in card

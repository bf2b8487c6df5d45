"""What is pushed names the base by its id, and no folder of the machine that trained or measured."""

from __future__ import annotations

import contextlib
import io
import json
from unittest import mock

from peft import get_peft_model
from transformers import LlamaForCausalLM

from peft_longlora import LongLoraConfig
from peft_longlora.hub.base import logger
from peft_longlora.hub.readme import _TRAINERS_DRAFT
from tests.helpers.tiny import extend, make
from tests.hub.test_push_results import push_both, push_by_command, save_measured


def test_no_path_of_this_machine_is_pushed(hub, pusher, tmp_path):
    """Results say the base's id, or else a folder's last part; so does the recipe. The folder stays as it is."""
    folder = tmp_path / "adapter"
    pusher(save_measured, str(folder))
    (folder / "README.md").unlink()  # it names the base
    local = tmp_path / "secret" / "my-base"
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(local)}))
    results = json.loads((folder / "results.json").read_text())
    results["model"] |= {"name": str(local), "tokenizer": "/secret/words", "adapter": "adapter"}
    results["notes"] = [f"The adapter names {str(local)!r} as its base."]
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "recipe.yaml").write_text("model: my-base\ndata:\n- books\n")
    for base, said in ((None, "my-base"), ("me/base", "me/base")):
        pusher(push_both, folder, "me/no-paths", base=base)
        files = hub.files("me/no-paths")
        pushed = json.loads(files["results.json"])
        assert pushed["model"] == {**results["model"], "name": said, "tokenizer": "words"}
        assert pushed["notes"] == [f"The adapter names {said!r} as its base."]
        assert f"model: {said}\n".encode() in files["recipe.yaml"] and b"- books" in files["recipe.yaml"]
        texts = [files[name] for name in ("README.md", "results.json", "recipe.yaml")]
        assert not any(b"secret" in text for text in texts)
    assert json.loads((folder / "results.json").read_text()) == results


def push_from_folder(folder: str, repo_id: str, **options) -> tuple[list[str], str]:
    """What a push of a model says whose base was loaded from a folder, and what its config names afterwards."""
    LlamaForCausalLM.from_pretrained("me/base").save_pretrained(folder)
    base = LlamaForCausalLM.from_pretrained(folder, attn_implementation="s2_attn")
    model = get_peft_model(base, LongLoraConfig(r=2, context_length=256))
    said: list[str] = []
    with mock.patch.object(logger, "warning", said.append):
        model.push_to_hub(repo_id, **options)
    return said, model.peft_config["default"].base_model_name_or_path


def test_a_model_whose_base_is_in_a_folder_is_pushed_with_a_word(hub, pusher, tmp_path):
    """As `longlora push` does: the base's id is given, or known to the repository, or missed aloud."""
    folder, repo = str(tmp_path / "my-base"), "me/from-a-folder"

    def named() -> str:
        return json.loads(hub.files(repo)["adapter_config.json"])["base_model_name_or_path"]

    [said], after = pusher(push_from_folder, folder, repo)
    assert f"names the base {folder!r}, which is not on the Hub, so nobody else can load the adapter" in said
    assert "base='owner/name'" in said and named() == after == folder
    said, after = pusher(push_from_folder, folder, repo, base="me/base")
    assert said == [] and named() == "me/base" and after == folder, "the model in memory is as it was"
    assert "base_model: me/base" in hub.files(repo)["README.md"].decode()
    [said], _ = pusher(push_from_folder, folder, repo)
    assert "names 'me/base': this is taken" in said and named() == "me/base"
    assert "base='/nowhere' is no id on the Hub" in pusher(push_from_folder, folder, repo, base="/nowhere").message


def test_a_trainers_push_says_it_too(tmp_path, monkeypatch):
    """A Trainer uploads its folder, and asks the model to complete its card before."""
    said: list[str] = []
    monkeypatch.setattr(logger, "warning_once", said.append)
    model = extend(make())
    for name, count in (("/home/me/base", 1), ("me/base", 1)):
        model.peft_config["default"].base_model_name_or_path = name
        (tmp_path / "README.md").write_text(f"---\ntags: []\n---\n{_TRAINERS_DRAFT}")
        model.create_or_update_model_card(str(tmp_path))
        assert len(said) == count and "'/home/me/base', which is not on the Hub" in said[0]
    assert "longlora push FOLDER NAME --base owner/name" in said[0]


def test_a_name_that_is_none_and_a_token_that_is_wrong_are_said_with_their_cure(hub, pusher, tmp_path):
    pusher(save_measured, str(tmp_path))
    failure = pusher(push_both, tmp_path, "me/x/y")
    assert "'me/x/y' is no name of a repository. Give 'owner/name'" in failure.message
    hub.fail("POST", "/create", 401)
    assert pusher(said_by_command, str(tmp_path), "me/wrong") == (
        "longlora push: error: The Hub does not accept the token. Log in with `hf auth login`, or set HF_TOKEN to a "
        "token that may write.\n"
    )


def said_by_command(*arguments: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert push_by_command(*arguments) == 2
    return said.getvalue()

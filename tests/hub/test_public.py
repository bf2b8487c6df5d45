"""What is pushed names the base by its id, and no folder of the machine that trained or measured."""

from __future__ import annotations

import contextlib
import io
import json

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

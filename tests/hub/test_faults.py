"""Broken connections, full disks and bad files on the way to the hub and back: one clear error, nothing half done."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import warnings

import pytest
from huggingface_hub import get_token
from peft import PeftConfig, PeftModel
from transformers import LlamaForCausalLM

from peft_longlora.hub.push import push_card
from peft_longlora.hub.trainers import use_longlora_card
from tests.helpers.adapters_on_hub import CODE, changed_adapter, is_ours, logits, new_adapter, pull, push_with_card
from tests.helpers.hub_process import Failure, answer


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


SECONDS = {
    "connection dropped amid an upload",
    "500 at the upload",
}  # the client waits longer and longer between its tries
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in SECONDS else name for name in FAULTS]


@pytest.mark.parametrize("name", CASES)
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
        ("me/base", "ValueError", "me/base holds no adapter_config.json .*it is not an adapter. Push one there first"),
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

"""`load_model` says what is wrong with an adapter's place, in the words of its arguments."""

from __future__ import annotations

import os
import re

import pytest

from tests.helpers.adapters_on_hub import changed_adapter


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
        ("me/base", True, "no adapter_config.json in that repository"),
        ("me/../adapter", True, "no such folder, and no id on the Hub"),
        ("../../nowhere", True, "no such folder, and no id on the Hub"),
        ("me/newer", True, "format_version=2: .* pip install -U peft-longlora"),
        ("me/no-bytes", True, r"\(0 bytes\) is damaged: .* Delete .*blobs.*, or load with force_download=True"),
        ("me/no-type", True, "adapter_config.json names no peft_type.* Get it again"),
        ("me/list", True, "adapter_config.json holds a list.* Get it again"),
        ("me/no-json", True, "adapter_config.json is damaged: .* Get it again"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_argument(hub, pushed, puller, coder, adapter, with_token, message):
    hub.put("me/hidden", hub.files("me/adapter"), private=True)
    hub.put("me/newer", changed_adapter(hub, format_version=2))
    hub.put("me/no-bytes", {**hub.files("me/adapter"), "adapter_model.safetensors": b""})
    hub.put("me/no-type", {**hub.files("me/adapter"), "adapter_config.json": b'{"r": 2}'})
    hub.put("me/list", {**hub.files("me/adapter"), "adapter_config.json": b"[1]"})
    hub.put("me/no-json", {**hub.files("me/adapter"), "adapter_config.json": b"{"})
    failure = puller(load_by_our_door, adapter, with_token)
    assert failure.types[0] == "ValueError" and f"adapter={adapter!r}" in failure.message, failure
    assert re.search(message, failure.message), failure


def load_without_a_hub(name: str, what: str) -> str:
    """What is said if nobody listens where the Hub is; transformers would ask six times, for 23 seconds."""
    from unittest import mock

    from huggingface_hub import HfApi, hf_hub_url

    from peft_longlora.data import read_documents
    from peft_longlora.hub.loading import load_model

    nowhere = "http://127.0.0.1:9"

    def nobody(*args, **kwargs):
        return hf_hub_url(*args, **kwargs, endpoint=nowhere)

    with (
        mock.patch("peft_longlora.adapter.files.hf_hub_url", nobody),
        mock.patch("peft_longlora.data.hub_rows.dataset_info", HfApi(nowhere).dataset_info),
        mock.patch("time.sleep") as waited,
    ):
        try:
            load_model(name) if what == "model" else list(read_documents(name))
        except (ValueError, FileNotFoundError) as error:
            return f"{error} (waited {waited.call_count} times)"
    return "loaded"


@pytest.mark.parametrize(
    "name, message",
    [
        ("nosuch", "no such folder, and the Hub is not reached to look for it there"),
        ("me/nosuch", "no such folder, and the Hub is not reached to look for it there"),
        ("a//b", "no such folder, and no id on the Hub"),
        ("./nosuch", "no such folder."),
    ],
)
def test_a_base_that_is_nowhere_is_asked_for_once(puller, name, message):
    said = puller(load_without_a_hub, name, "model")
    assert said.startswith(f"model={name!r}: {message}") and said.endswith("(waited 0 times)")


def test_data_that_is_nowhere_is_asked_for_once(puller):
    said = puller(load_without_a_hub, "me/nosuch", "data")
    assert said.startswith("me/nosuch: no file or folder here, and the Hub is not reached to look for it there")
    assert said.endswith("(waited 0 times)")

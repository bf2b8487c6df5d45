"""A hub on 127.0.0.1 and two processes that push to it and pull from it, for all tests of this folder.

The processes stay, since starting one costs more than all the tests. huggingface_hub reads its environment when it is
imported, so what talks to the hub runs there; the hub itself runs here, where tests look at it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.helpers.adapters_on_hub import push_private
from tests.helpers.configs import tiny_llama_config
from tests.helpers.hub_process import answer, start_process
from tests.helpers.loopback_hub import LoopbackHub
from tests.helpers.paths import EMBEDDED


@pytest.fixture(scope="package")
def hub():
    with LoopbackHub() as server:
        torch.manual_seed(1)
        with tempfile.TemporaryDirectory() as folder:
            LlamaForCausalLM(tiny_llama_config()).save_pretrained(folder)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        server.put("me/base", {**files, "README.md": b"---\nlicense: llama2\n---\nA base.\n"})
        yield server
    assert not server.unknown, "huggingface_hub made calls that the loopback hub does not know"


@pytest.fixture(scope="package")
def processes(hub, tmp_path_factory):
    both = [start_process(hub, tmp_path_factory.mktemp(name)) for name in ("pusher", "puller")]
    yield both
    for process in both:
        process.shutdown()


@pytest.fixture(scope="package")
def pusher(processes):
    return lambda function, *args, **kwargs: processes[0].submit(answer, function, *args, **kwargs).result()


@pytest.fixture(scope="package")
def puller(processes):
    return lambda function, *args, **kwargs: processes[1].submit(answer, function, *args, **kwargs).result()


@pytest.fixture(scope="package")
def pushed(pusher):
    """The logits of the model whose adapter is me/adapter."""
    return pusher(push_private, "me/adapter")


@pytest.fixture(scope="package")
def coder(hub, tmp_path_factory):
    """On the hub: a tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("coder")
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    LlamaForCausalLM(tiny_llama_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hub.put("me/coder", {path.name: path.read_bytes() for path in folder.iterdir()})
    return "me/coder"

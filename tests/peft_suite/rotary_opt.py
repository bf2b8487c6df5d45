"""OPT's module layout with Llama's layers inside: the stand-in for opt-125m, which has no rotary embeddings.

PEFT's tests of tied embeddings name modules of OPT (`model.decoder.embed_tokens`, layer 5), so that no model of
transformers with rotary embeddings will do.
"""

from __future__ import annotations

from typing import Any, ClassVar

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel


class RotaryOPTConfig(LlamaConfig):
    model_type = "rotary_opt"


class RotaryOPTModel(LlamaPreTrainedModel):
    config_class = RotaryOPTConfig

    def __init__(self, config: RotaryOPTConfig) -> None:
        super().__init__(config)
        self.decoder = LlamaModel(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed_tokens = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.decoder(*args, **kwargs)


class RotaryOPTForCausalLM(LlamaForCausalLM):
    config_class = RotaryOPTConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: RotaryOPTConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)  # Llama's own ties names that are not here
        self.model = RotaryOPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)


def register() -> None:
    """Let transformers load it by its config, and stock LoRA aim at what it aims at in OPT."""
    AutoConfig.register(RotaryOPTConfig.model_type, RotaryOPTConfig)
    AutoModelForCausalLM.register(RotaryOPTConfig, RotaryOPTForCausalLM)
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets[RotaryOPTConfig.model_type] = targets["opt"]
